"""What tables of several studies have in common: values over repeats."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable

from petra_zoo.bench.results import Record


def group_runs(runs: Iterable[Record], name: Callable[[Record], str]) -> dict[str, list[Record]]:
    """The repeats of every contender, by what a table calls it; runs that broke down are left out."""
    groups: dict[str, list[Record]] = {}
    for run in runs:
        if not run.failed:
            groups.setdefault(name(run), []).append(run)
    return groups


def median_of(runs: Iterable[Record], value: str) -> float:
    """The median of a measured value over repeats; NaN where none has it."""
    found = [number for run in runs if not math.isnan(number := run.number(value))]
    return statistics.median(found) if found else math.nan


def cell(number: float, digits: int) -> str:
    """A number as a table shows it; a dash where there is none."""
    return "-" if math.isnan(number) else f"{number:.{digits}f}"


def list_of(run: Record, name: str) -> list[float]:
    """A list of measured values; empty where there is none."""
    values = run.result.get(name)
    return [float(value) for value in values if isinstance(value, int | float)] if isinstance(values, list) else []
