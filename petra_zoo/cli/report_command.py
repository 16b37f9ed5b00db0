"""`petra-zoo report`: tables and plots of what studies have found."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    results: Annotated[
        list[Path] | None, typer.Argument(metavar="RESULTS.json...", help="Of petra-zoo bench.", dir_okay=False)
    ] = None,
) -> None:
    """Write Markdown tables and plots of results, and keep those of Markdown pages up to date."""
    from petra_zoo.bench.results import Results
    from petra_zoo.bench.tables import tables

    for path in results or []:
        for name, table in tables(Results.read(path)).items():
            typer.echo(f"{path} {name}\n\n{table}")
