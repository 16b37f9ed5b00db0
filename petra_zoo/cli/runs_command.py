"""`petra-zoo runs`: what was trained, in a table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from petra_zoo.cli.output import print_table
from petra_zoo.strict_json import to_json

if TYPE_CHECKING:
    from petra_zoo.training.runs import RunFacts


def runs(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where the runs are, at any depth.")] = Path("runs"),
    sort: Annotated[
        Literal["date", "run", "model", "dataset", "method", "stages", "epochs", "best", "last", "seconds", "state"],
        typer.Option(help="By what; the best accuracy comes first."),
    ] = "date",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List runs: what each trained, its best and last top-1, its time, and its state.

    A run is running, finished, can go on (the command that started it goes on),
    or has failed: nothing was saved that it could go on from.
    """
    from petra_zoo.training.runs import list_runs

    found = list_runs(folder, sort)
    if as_json:
        typer.echo(to_json([run.as_dict() for run in found], indent=1))
    elif found:
        columns = ("run", "model", "data", "method", "epochs", "best", "last", "time", "state")
        print_table(columns, [_row(run) for run in found])
    else:
        typer.echo(f"no runs in {folder}", err=True)


def _row(run: RunFacts) -> tuple[str, ...]:
    method = f"{run.method} x{run.stages}" if run.stages and run.stages > 1 else run.method or ""
    best, last = ("" if top1 is None else f"{top1:.2f}" for top1 in (run.best, run.last))
    epochs = f"{run.epochs}/{run.of_epochs or '?'}"
    if run.of_updates is not None:
        epochs = f"{run.epochs} ({run.updates}/{run.of_updates} updates)"
    time = "" if run.seconds is None else _duration(run.seconds)
    return run.run, run.model or "", _data(run), method, epochs, best, last, time, run.state


def _data(run: RunFacts) -> str:
    """Its name; that of a folder of images is the folder's own."""
    if run.dataset == "folder" and run.data_dir:
        return f"{Path(run.data_dir).name}/"
    return run.dataset or ""


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{rest} s" if not minutes else f"{minutes}:{rest:02} min" if minutes < 60 else f"{minutes / 60:.1f} h"
