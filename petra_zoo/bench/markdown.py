"""Markdown tables, and what the tables of several studies have in common."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence

from petra_zoo.bench.results import Record


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table, a line for its head and each of its rows, without a line break at the end."""
    lines = [_line(columns), "|---" * len(columns) + "|", *map(_line, rows)]
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return "|" + "".join(f" {_escaped(text)} |" if text else " |" for text in cells)


def _escaped(text: str) -> str:
    """Text that ends neither its cell nor its line."""
    return " ".join(text.replace("|", "\\|").splitlines())


def group_runs(runs: Iterable[Record], name: Callable[[Record], str]) -> dict[str, list[Record]]:
    """The repeats of every contender, by what a table calls it; runs that broke down are left out."""
    groups: dict[str, list[Record]] = {}
    for run in runs:
        if not run.failed:
            groups.setdefault(name(run), []).append(run)
    return groups


def median_of(runs: Iterable[Record], value: str) -> float:
    """The median of a measured value over repeats; NaN where none has it."""
    found = [number for run in runs if (number := run.number(value)) == number]
    return statistics.median(found) if found else float("nan")


def cell(number: float, digits: int, unit: str = "") -> str:
    """A number as a table shows it; a dash where there is none."""
    return f"{number:.{digits}f}{unit}" if number == number else "-"
