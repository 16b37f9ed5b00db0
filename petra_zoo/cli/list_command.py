"""`petra-zoo list`: the networks of the zoo."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from petra_zoo.models.describe import describe, model_names


def list_models(
    pattern: Annotated[str, typer.Argument(help="Wildcards, such as '*_cifar'.")] = "*",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the networks that timm.create_model makes once petra_zoo is imported."""
    names = model_names(pattern)
    console = Console()
    if as_json:
        typer.echo(json.dumps([describe(name).as_dict() for name in names], indent=2))
    elif console.is_terminal:
        table = Table("model", "parameters", "input", "units", "reversible")
        for row in map(describe, names):
            size = "x".join(map(str, row.input_size))
            table.add_row(row.name, f"{row.parameters / 1e6:.2f} M", size, str(row.units), str(row.reversible_units))
        console.print(table)
    else:
        typer.echo("".join(f"{name}\n" for name in names), nl=False)
