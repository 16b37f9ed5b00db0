"""`petra-zoo checkpoint`: what runs can be continued from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from petra_zoo.cli.output import print_table
from petra_zoo.strict_json import Json, to_json

app = typer.Typer(help="Look at, verify and remove what runs can be continued from.", no_args_is_help=True)
Directory = Annotated[Path, typer.Argument(metavar="DIR", help="A run directory, or one checkpoint in it.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def verify(directory: Directory, as_json: AsJson = False) -> None:
    """Read every byte of every checkpoint and compare; exit code 1 where one is damaged."""
    from petra_zoo.checkpoints.store import checkpoints_in, damage_of

    verdicts = {path.name: damage_of(path) for path in checkpoints_in(directory)}
    if as_json:
        typer.echo(to_json(verdicts, indent=2))
    else:
        for name, damage in verdicts.items():
            typer.echo(f"{name}  {damage or 'every byte is as it was saved'}")
    if any(verdicts.values()):
        raise typer.Exit(1)


@app.command()
def show(directory: Directory, as_json: AsJson = False) -> None:
    """Say what each checkpoint is of: tick, epoch, stages, metrics, size, date."""
    from petra_zoo.checkpoints.manifest import read_manifest
    from petra_zoo.checkpoints.store import checkpoints_in

    manifests = {path.name: read_manifest(path) for path in checkpoints_in(directory)}
    if as_json:
        facts: Json = {name: {**found.facts(), "bytes": found.size} for name, found in manifests.items()}
        typer.echo(to_json(facts, indent=2))
        return
    rows = []
    for name, found in manifests.items():
        metrics = "  ".join(f"{key} {value:.4g}" for key, value in (found.metrics or {}).items())
        place = "finished" if found.finished else f"{found.epoch + 1}, micro-batch {found.batch}"
        stages = ",".join(map(str, found.stages))
        rows.append((name, place, stages, metrics, f"{found.size / 2**20:.1f} MiB", found.date))
    print_table(("checkpoint", "epoch", "stages", "metrics", "size", "saved"), rows)


@app.command()
def prune(
    directory: Directory,
    keep_last: Annotated[int, typer.Option(min=1, help="How many of the newest to keep.")] = 1,
    keep_best: Annotated[int, typer.Option(min=0, help="How many of the best to keep.")] = 0,
    metric: Annotated[str, typer.Option(help="What the best are told by: loss, top1 or top5.")] = "top1",
) -> None:
    """Remove old checkpoints; the only good one is always kept."""
    from petra_zoo.checkpoints.store import store_of

    for name in store_of(directory).prune(keep_last, keep_best, metric):
        typer.echo(f"removed {name}")
