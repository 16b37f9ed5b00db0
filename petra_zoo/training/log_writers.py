"""A run's numbers where people look at them: TensorBoard and Weights & Biases, each through its own writer.

`metrics.jsonl` is the run's log; these follow it, line by line. A run that goes on has it cut to where its checkpoint
was, and a writer then begins with the lines that are in there: it has neither gaps nor doubles.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

from petra_zoo.errors import UserError
from petra_zoo.strict_json import JsonObject

if TYPE_CHECKING:
    from petra_zoo.settings.types import LogTarget

TENSORBOARD, WANDB, WANDB_ID = "tensorboard", "wandb", ".wandb-id"  # in a run directory
_GROUPS = {"train": "train", "validation": "val", "skipped": "skipped"}  # of numbers, by their line's event
_NO_NUMBERS = ("event", "epoch", "update", "tick")


class LogWriter(ABC):
    """Follows a run's log."""

    @abstractmethod
    def begin(self, lines: Sequence[JsonObject]) -> None:
        """Before the first tick: the log so far; what it has written beyond is forgotten."""

    @abstractmethod
    def write(self, line: JsonObject) -> None:
        """The next line."""

    @abstractmethod
    def close(self) -> None:
        """There will be no more, whether the run is over or not."""


def require_log_writers(targets: Sequence[LogTarget]) -> None:
    """Refuses targets whose package is missing.

    Raises:
        UserError: says how to install it.
    """
    for target in targets:
        if find_spec(target) is None:
            raise UserError(f"log_to: {target} is not installed: pip install 'petra-zoo[{target}]'")


def open_log_writers(targets: Sequence[LogTarget], path: Path, recipe: JsonObject) -> list[LogWriter]:
    """Writers for a run directory.

    Args:
        targets: which.
        path: of the run directory.
        recipe: its settings, for those that show them.
    """
    writers: list[LogWriter] = []
    for target in dict.fromkeys(targets):
        writers.append(TensorBoardWriter(path) if target == "tensorboard" else WandbWriter(path, recipe))
    return writers


class TensorBoardWriter(LogWriter):
    """Events in the run directory's folder `tensorboard`: numbers of training by tick, of validation by epoch.

    Args:
        path: of the run directory.
    """

    def __init__(self, path: Path) -> None:
        self.folder = path / TENSORBOARD

    def begin(self, lines: Sequence[JsonObject]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        for file in self.folder.glob("events.out.tfevents.*"):
            file.unlink()
        self._writer = SummaryWriter(str(self.folder))
        for line in lines:
            self.write(line)

    def write(self, line: JsonObject) -> None:
        step = line.get("tick", line.get("epoch"))
        for name, number in _numbers(line).items():
            self._writer.add_scalar(name, number, step)

    def close(self) -> None:
        self._writer.close()


class WandbWriter(LogWriter):
    """A run of Weights & Biases, whose id is kept in the run directory; its own variables say mode, project and so on.

    A step is a line of the log, so that what it has seen before is known by its number.

    Args:
        path: of the run directory.
        recipe: its settings.
    """

    def __init__(self, path: Path, recipe: JsonObject) -> None:
        self.path, self.recipe = path, recipe

    def begin(self, lines: Sequence[JsonObject]) -> None:
        import wandb

        kept = self.path / WANDB_ID
        if not kept.exists():
            kept.write_text(uuid4().hex, encoding="utf-8")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "petra-zoo"),
            name=self.path.name,
            id=kept.read_text(encoding="utf-8").strip(),
            resume="allow",
            dir=str(self.path),
            config=self.recipe,
        )
        self._run.define_metric("train/*", step_metric="tick")
        self._run.define_metric("val/*", step_metric="epoch")
        self._next, seen = 0, int(self._run.step)
        for line in lines:
            self._log(line, seen)
        self._seen = seen

    def write(self, line: JsonObject) -> None:
        self._log(line, self._seen)

    def close(self) -> None:
        self._run.finish()

    def _log(self, line: JsonObject, seen: int) -> None:
        """Hands over a line, unless it was already: before a run went back to its checkpoint."""
        if self._next >= seen:
            values: JsonObject = {key: line[key] for key in ("epoch", "tick") if key in line}
            values.update(_numbers(line))
            self._run.log(values, step=self._next)
        self._next += 1


def _numbers(line: JsonObject) -> dict[str, float]:
    group = _GROUPS.get(str(line["event"]), str(line["event"]))
    numbers = {key: x for key, x in line.items() if key not in _NO_NUMBERS and isinstance(x, int | float)}
    return {f"{group}/{key}": float(x) for key, x in numbers.items()}
