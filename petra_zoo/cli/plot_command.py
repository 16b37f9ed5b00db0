"""`petra-zoo plot`: how runs went, in a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def plot(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories.")],
    output: Annotated[Path, typer.Option(metavar="FILE.png", help="The picture; its ending says the format.")],
) -> None:
    """Draw loss, accuracy, learning rate and throughput of one or more runs in one picture."""
    from petra_zoo.figures import check_figure
    from petra_zoo.training.run_plot import plot_runs

    check_figure(output)
    plot_runs(runs, output)
    typer.echo(f"saved {output}")
