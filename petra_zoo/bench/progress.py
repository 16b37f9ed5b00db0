"""What a person sees of a study: a bar on a terminal, a line per run anywhere else."""

from __future__ import annotations

import math
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import rich.progress as bars
from rich.console import Console

from petra_zoo.bench.results import Record, Results
from petra_zoo.bench.study import Study, Trial
from petra_zoo.strict_json import Json

_SHOWN = 4  # measured values in a line


class Progress:
    """Tells which runs are going on, and what came out of those that have ended.

    Args:
        study: what runs.
        results: what there is, and will be.
        path: of the results file.
        console: rich's; whether it is a terminal decides between a bar and lines.
    """

    def __init__(self, study: Study, results: Results, path: Path, console: Console | None = None) -> None:
        self.study, self.results, self.path = study, results, path
        self.console = console or Console(highlight=False)
        self._began: dict[str, float] = {}
        self._bar: bars.Progress | None = None
        self._task = bars.TaskID(0)

    def __enter__(self) -> Self:
        done, total = self._counts()
        if done:
            self._line(f"{self.study.name}: {done} of {total} runs are in {self.path}")
        if self.console.is_terminal and done < total:
            columns = (bars.SpinnerColumn(), bars.TextColumn("{task.description}"), bars.BarColumn(),
                       bars.MofNCompleteColumn(), bars.TimeElapsedColumn(), bars.TimeRemainingColumn())  # fmt: skip
            # A run takes minutes: the time that is left follows from all of them, not from the last seconds.
            self._bar = bars.Progress(*columns, console=self.console, speed_estimate_period=7 * 24 * 3600)
            self._task = self._bar.add_task(self.study.name, total=total, completed=done)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()
        if isinstance(error, KeyboardInterrupt):
            done, total = self._counts()
            self._line(f"interrupted: {done} of {total} runs are in {self.path}; the same command does the rest")

    def began(self, trial: Trial) -> None:
        """A worker works on it."""
        self._began[trial.key] = time.monotonic()
        if self._bar:
            self._bar.update(self._task, description=self.study.title(trial))

    def ended(self, run: Record) -> None:
        """It is in the file."""
        seconds = time.monotonic() - self._began.pop(run.trial.key)
        done, total = self._counts()
        self._line(f"{done:>4}/{total}  {self.study.title(run.trial)}: {shown(run)}  ({seconds:.0f} s)")
        if self._bar:
            self._bar.update(self._task, completed=done, total=total)

    def _counts(self) -> tuple[int, int]:
        return sum(trial in self.results for trial in self.study.trials(self.results)), self.study.expected(
            self.results
        )

    def _line(self, text: str) -> None:
        self.console.print(text, soft_wrap=True, markup=False)


def shown(run: Record) -> str:
    """The first measured values in a few words, or why there are none."""
    if run.failed:
        return f"failed: {run.failed}"
    numbers = [(name, _number(value)) for name, value in run.result.items()]
    return "  ".join(f"{name} {number}" for name, number in [pair for pair in numbers if pair[1]][:_SHOWN])


def _number(value: Json) -> str | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return str(value) if isinstance(value, int) or not math.isfinite(value) else f"{value:.4g}"
