"""All runs in a folder: what each trained, how good it is, and whether it can go on."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from petra_zoo.checkpoints.manifest import Manifest
from petra_zoo.checkpoints.packing import CheckpointError
from petra_zoo.checkpoints.provenance import ENVIRONMENT, EVALUATION
from petra_zoo.checkpoints.store import CHECKPOINTS, Store
from petra_zoo.errors import UserError
from petra_zoo.settings.recipe_files import recipe_settings
from petra_zoo.strict_json import Json, JsonObject
from petra_zoo.training.run_directory import LOGS, RECIPE
from petra_zoo.training.run_lock import is_held

State = Literal["running", "finished", "can go on", "failed"]
SortKey = Literal["date", "run", "model", "dataset", "method", "stages", "epochs", "best", "last", "seconds", "state"]
_BEST_FIRST = ("best", "last", "epochs")  # the others: from small to large


@dataclass(frozen=True)
class RunFacts:
    """One run; what is not known is None.

    Attributes:
        run: its directory, below the folder that was looked into.
        epochs: the last that was validated.
        of_epochs: how many there are to be.
        updates, of_updates: how many were made by the last line of its log, and are to be, where `max_updates` says so.
        best, last: top-1 on the validation split in percent, of all validations and of the latest.
        seconds: from the start to the end, of a run that has finished.
        state: `can go on` has a checkpoint; `failed` has none, and is not in progress.
        date: of its recipe, ISO 8601.
    """

    run: str
    model: str | None
    dataset: str | None
    data_dir: str | None
    method: str | None
    stages: int | None
    epochs: int
    of_epochs: int | None
    updates: int | None
    of_updates: int | None
    best: float | None
    last: float | None
    seconds: float | None
    state: State
    date: str

    def as_dict(self) -> JsonObject:
        """For JSON."""
        return asdict(self)


def list_runs(folder: Path, sort: SortKey = "date") -> list[RunFacts]:
    """The runs in a folder at any depth, or the one that it is.

    Args:
        folder: such as `runs`.
        sort: by what; the best accuracy first, all others from small to large, what is not known last.

    Raises:
        UserError: there is no such folder.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}: name the one that holds the runs, such as runs")
    facts = [_facts_of(path, folder) for path in _directories(folder)]
    sign = -1.0 if sort in _BEST_FIRST else 1.0

    def place(run: RunFacts) -> tuple[bool, float | str, str]:
        value = getattr(run, sort)
        return value is None, sign * value if isinstance(value, int | float) else value or "", run.run

    return sorted(facts, key=place)


def read_summary(run: Path) -> list[dict[str, str]]:
    """The rows of summary.csv; none before the first validation. One that is damaged is left out."""
    try:
        with (run / LOGS[1]).open(newline="", encoding="utf-8") as file:
            return [row for row in csv.DictReader(file) if _is_whole(row)]
    except (OSError, ValueError, csv.Error):
        return []


def read_log(run: Path) -> Iterator[JsonObject]:
    """The lines of metrics.jsonl; one that is being written this moment is left out."""
    try:
        lines = (run / LOGS[0]).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict):
            yield found


def _is_whole(row: dict[str, str]) -> bool:
    """Whether it has an epoch, and a number or nothing in every column."""
    try:
        numbers = [float("nan" if value == "" else value) for value in row.values()]
        return len(numbers) > 1 and int(row["epoch"]) > 0
    except (KeyError, TypeError, ValueError):
        return False


def _directories(folder: Path) -> Iterator[Path]:
    for root, inner, files in os.walk(folder):
        inner.sort()
        if RECIPE in files:
            inner.clear()  # its last model and its checkpoints have recipes too
            yield Path(root)


def _facts_of(path: Path, folder: Path) -> RunFacts:
    recipe = path / RECIPE
    try:
        settings = recipe_settings(str(recipe))
    except UserError:  # it has just been claimed, or is damaged
        settings = {}
    model, dataset, data_dir, method = (_text(settings.get(key)) for key in ("model", "dataset", "data_dir", "method"))
    numbers = (settings.get(key) for key in ("stages", "epochs", "max_updates"))
    stages, of_epochs, of_updates = (value if isinstance(value, int) else None for value in numbers)
    rows = read_summary(path)
    top1 = [float(row["eval_top1"]) for row in rows if row.get("eval_top1")]
    started = datetime.fromtimestamp(recipe.stat().st_mtime, UTC)
    return RunFacts(
        run=path.name if path == folder else str(path.relative_to(folder)),
        model=model,
        dataset=dataset,
        data_dir=data_dir,
        method=method,
        stages=stages,
        epochs=int(rows[-1]["epoch"]) if rows else 0,
        of_epochs=of_epochs,
        updates=None if of_updates is None else _updates(path),
        of_updates=of_updates,
        best=max(top1, default=None),
        last=top1[-1] if top1 else None,
        seconds=_seconds(path),
        state=_state(path),
        date=started.strftime("%Y-%m-%dT%H:%M:%SZ"),
    )


def _updates(path: Path) -> int:
    found = (line.get("update") for line in read_log(path))
    return max((update for update in found if isinstance(update, int)), default=0)


def _state(path: Path) -> State:
    if is_held(path):
        return "running"
    newest = _newest_manifest(path)
    if newest.finished if newest else (path / EVALUATION).exists():
        return "finished"
    return "can go on" if newest else "failed"


def _newest_manifest(path: Path) -> Manifest | None:
    """Of the newest checkpoint whose manifest is sound; its other files are not read."""
    store = Store(path / CHECKPOINTS)
    for name in reversed(store.names()):
        try:
            return store.open(name).manifest
        except CheckpointError:
            continue
    return None


def _seconds(path: Path) -> float | None:
    try:
        found = json.loads((path / ENVIRONMENT).read_text(encoding="utf-8")).get("wall_seconds")
    except (OSError, ValueError, AttributeError):
        return None
    return float(found) if isinstance(found, int | float) else None


def _text(value: Json) -> str | None:
    return value if isinstance(value, str) else None
