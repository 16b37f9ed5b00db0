"""Markdown tables of a study's results: every study names its own."""

from __future__ import annotations

from collections.abc import Callable

from petra_zoo.bench.accuracy_tables import accuracy_tables
from petra_zoo.bench.conversion_tables import conversion_tables
from petra_zoo.bench.memory import memory_tables
from petra_zoo.bench.pipeline_tables import pipeline_tables
from petra_zoo.bench.results import Results
from petra_zoo.bench.speed import speed_tables
from petra_zoo.errors import UserError
from petra_zoo.settings.merging import nearest

# What a kind of study shows: Markdown by a table's name. These modules import no torch.
TABLES: dict[str, Callable[[Results], dict[str, str]]] = {
    "accuracy": accuracy_tables,
    "conversion": conversion_tables,
    "memory": memory_tables,
    "pipeline": pipeline_tables,
    "speed": speed_tables,
}


def tables(results: Results) -> dict[str, str]:
    """All tables of a results file, by name.

    Raises:
        UserError: no study of that kind is known.
    """
    if results.kind not in TABLES:
        raise UserError(f"no tables are known of a study of kind '{results.kind}'; expected {', '.join(TABLES)}")
    return TABLES[results.kind](results)


def find_table(results: Results, name: str) -> str:
    """One of the tables.

    Raises:
        UserError: there is no such table; gives the nearest.
    """
    found = tables(results)
    if name not in found:
        raise UserError(f"study '{results.study}' has no table '{name}'; did you mean {nearest(name, found)}?")
    return found[name]
