"""`petra-zoo info`: one network in detail."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from petra_zoo.models.describe import describe


def info(
    name: Annotated[str, typer.Argument(help="A model's name (petra-zoo list).")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show a network: parameters, operations, input, units and runs."""
    row = describe(name)
    if as_json:
        typer.echo(json.dumps(row.as_dict(), indent=2))
        return
    typer.echo(f"{row.name}: {row.summary}")
    typer.echo(f"  parameters  {row.parameters:,}")
    typer.echo(f"  operations  {row.macs / 1e9:.3f} G multiply-adds per image of {'x'.join(map(str, row.input_size))}")
    typer.echo(f"  classes     {row.num_classes}")
    typer.echo(
        f"  units       {row.units}, of them {row.reversible_units} reversible (stages for petra: 1 to {row.units})"
    )
    typer.echo(f"  runs        {', '.join(map(str, row.runs)) or 'none'} reversible blocks in a row")
    typer.echo(f"  coupling    {', '.join(f'{g:g}' for g in row.coupling)}")
