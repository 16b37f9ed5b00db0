"""`petra-zoo demo`: watch PETRA train."""

from __future__ import annotations

from typing import Annotated

import typer

from petra_zoo.cli.completion import complete_setting


def demo(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE", help="Settings that replace the demo recipe's.", autocompletion=complete_setting
        ),
    ] = None,
) -> None:
    """Train a reversible network on handwritten digits with PETRA, evaluate it and show some predictions."""
    from petra_zoo.training.demo import run_demo

    for line in run_demo(overrides or []):
        typer.echo(line)
