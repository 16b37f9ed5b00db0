"""`petra-zoo list`: the networks of the zoo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from petra_zoo.cli.output import on_terminal, print_lines, print_table
from petra_zoo.strict_json import to_json

MOST = 40  # networks in a table: with another timm than the zoo was made with, each is built for its sizes


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
        _write_page(pattern, html)
    elif pretrained:
        _list_pretrained(pattern, as_json)
    else:
        _list_networks(pattern, as_json)


def _list_networks(pattern: str, as_json: bool) -> None:
    from petra_zoo.models.describe import model_names
    from petra_zoo.models.known_networks import describe_known

    names = model_names(pattern)
    if as_json:
        typer.echo(to_json([describe_known(name).as_dict() for name in names], indent=2))
    elif on_terminal() and len(names) <= MOST:
        rows = [
            (
                row.name,
                f"{row.parameters / 1e6:.2f} M",
                "x".join(map(str, row.input_size)),
                str(row.units),
                str(row.reversible_units),
            )
            for row in map(describe_known, names)
        ]
        print_table(("model", "parameters", "input", "units", "reversible"), rows)
    else:
        print_lines(names)
        if on_terminal():
            typer.echo(f"{len(names)} networks; petra-zoo list with a pattern of at most {MOST} shows sizes and units")


def _list_pretrained(pattern: str, as_json: bool) -> None:
    from petra_zoo.hub.catalog import pretrained_tags

    tags = pretrained_tags(pattern)
    if as_json:
        typer.echo(to_json([tag.as_dict() for tag in tags], indent=2))
    elif on_terminal():
        rows = [
            (
                tag.name,
                "x".join(map(str, tag.input_size)),
                str(tag.num_classes),
                tag.license or "not stated",
                tag.weights,
                f"{tag.reference.top1:.2f} %, {tag.reference.source}" if tag.reference else "not measured",
            )
            for tag in tags
        ]
        print_table(("name", "input", "classes", "licence", "weights", "top-1"), rows)
    else:
        print_lines(tag.name for tag in tags)


def _write_page(pattern: str, directory: Path) -> None:
    from rich.progress import track

    from petra_zoo.hub.page import write_page
    from petra_zoo.models.describe import model_names

    names = model_names(pattern)
    shown = track(names, "computing memory") if on_terminal() else names
    typer.echo(f"saved {write_page(shown, directory)}")
