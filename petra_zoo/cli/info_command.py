"""`petra-zoo info`: one network in detail."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from petra_zoo.cli.completion import complete_model
from petra_zoo.strict_json import to_json

if TYPE_CHECKING:
    from petra_zoo.hub.catalog import Tag

MIB = 2**20


def info(
    name: Annotated[
        str,
        typer.Argument(
            metavar="RUN_OR_MODEL",
            help="A model, or model.tag (petra-zoo list); or a run, a directory, hf-hub:ORG/NAME.",
            autocompletion=complete_model,
        ),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show a network: parameters, operations, units, runs, coupling, activation memory, pretrained weights."""
    from petra_zoo.hub.catalog import look_up

    facts = look_up(name)
    if as_json:
        typer.echo(to_json(facts.as_dict(), indent=2))
        return
    row, memory = facts.network, facts.memory
    typer.echo(f"{row.name}: {row.summary}")
    typer.echo(f"  parameters  {row.parameters:,}")
    typer.echo(f"  operations  {row.macs / 1e9:.3f} G multiply-adds per image of {'x'.join(map(str, row.input_size))}")
    typer.echo(f"  classes     {row.num_classes}")
    typer.echo(
        f"  units       {row.units}, of them {row.reversible_units} reversible (stages for petra: 1 to {row.units})"
    )
    typer.echo(f"  runs        {', '.join(map(str, row.runs)) or 'none'} reversible blocks in a row")
    typer.echo(f"  coupling    {', '.join(f'{g:g}' for g in row.coupling) or '0: an ordinary network'}")
    typer.echo(
        f"  activations {memory.plain / MIB:.2f} MiB per image stored, {memory.checkpointed / MIB:.2f} checkpointed, "
        f"{memory.reversible / MIB:.2f} reversible (computed, float32)"
    )
    for tag in facts.tags:
        typer.echo(f"  pretrained  {_line(tag)}")
    if not facts.tags and not facts.saved:
        typer.echo("  pretrained  none")


def _line(tag: Tag) -> str:
    known = tag.reference
    accuracy = f"top-1 {known.top1:.2f} % on {known.dataset} ({known.source})" if known else "accuracy not measured"
    return f"{tag.name}: {tag.weights}, licence {tag.license or 'not stated'}, {accuracy}"
