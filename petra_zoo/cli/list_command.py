"""`petra-zoo list`: the networks of the zoo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from petra_zoo.hub.catalog import pretrained_tags
from petra_zoo.hub.page import write_page
from petra_zoo.models.describe import describe_registered, model_names
from petra_zoo.strict_json import to_json


def list_models(
    pattern: Annotated[str, typer.Argument(help="Wildcards, such as '*_cifar'.")] = "*",
    pretrained: Annotated[bool, typer.Option("--pretrained", help="List pretrained weights instead.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    html: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write a page, DIR/index.html, to sort, search and compare.")
    ] = None,
) -> None:
    """List the networks that timm.create_model makes once petra_zoo is imported."""
    if html is not None:
        names = model_names(pattern)
        shown = track(names, "computing memory") if Console().is_terminal else names
        typer.echo(f"saved {write_page(shown, html)}")
        return
    if pretrained:
        _list_pretrained(pattern, as_json)
        return
    names = model_names(pattern)
    console = Console()
    if as_json:
        typer.echo(to_json([describe_registered(name).as_dict() for name in names], indent=2))
    elif console.is_terminal:
        table = Table("model", "parameters", "input", "units", "reversible")
        for row in map(describe_registered, names):
            size = "x".join(map(str, row.input_size))
            table.add_row(row.name, f"{row.parameters / 1e6:.2f} M", size, str(row.units), str(row.reversible_units))
        console.print(table)
    else:
        typer.echo("".join(f"{name}\n" for name in names), nl=False)


def _list_pretrained(pattern: str, as_json: bool) -> None:
    tags = pretrained_tags(pattern)
    console = Console()
    if as_json:
        typer.echo(to_json([tag.as_dict() for tag in tags], indent=2))
    elif console.is_terminal:
        table = Table("name", "input", "classes", "licence", "weights", "top-1")
        for tag in tags:
            top1 = f"{tag.reference.top1:.2f} %, {tag.reference.source}" if tag.reference else "not measured"
            size = "x".join(map(str, tag.input_size))
            table.add_row(tag.name, size, str(tag.num_classes), tag.license or "not stated", tag.weights, top1)
        console.print(table)
    else:
        typer.echo("".join(f"{tag.name}\n" for tag in tags), nl=False)
