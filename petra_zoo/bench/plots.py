"""Charts of a study's results: every study names its own."""

from __future__ import annotations

from collections.abc import Callable

from petra_zoo.bench.accuracy_charts import accuracy_charts
from petra_zoo.bench.charts import Chart
from petra_zoo.bench.memory import memory_charts
from petra_zoo.bench.results import Results, shown_as
from petra_zoo.errors import UserError
from petra_zoo.settings.merging import did_you_mean

# What a kind of study draws, by a chart's name; a kind that is not here draws nothing.
CHARTS: dict[str, Callable[[Results], dict[str, Chart]]] = {"accuracy": accuracy_charts, "memory": memory_charts}


def charts(results: Results) -> dict[str, Chart]:
    """All charts of a results file, by name.

    Raises:
        UserError: it does not hold what a study of its kind measures.
    """
    with shown_as(results):
        return CHARTS[results.kind](results) if results.kind in CHARTS else {}


def find_chart(results: Results, name: str) -> Chart:
    """One of the charts.

    Raises:
        UserError: there is no such chart; gives the nearest.
    """
    found = charts(results)
    if name not in found:
        near = f"; {did_you_mean(name, found)}" if found else ""
        raise UserError(f"study '{results.study}' has no plot '{name}'{near}")
    return found[name]
