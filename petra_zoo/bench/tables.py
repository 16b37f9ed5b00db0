"""Markdown tables of a study's results: every study names its own."""

from __future__ import annotations

from collections.abc import Callable

from petra_zoo.bench.accuracy_tables import accuracy_tables
from petra_zoo.bench.conversion_tables import conversion_tables
from petra_zoo.bench.families import families_tables
from petra_zoo.bench.faults import faults_tables
from petra_zoo.bench.finetuning import finetuning_tables
from petra_zoo.bench.gpu.tables import gpu_tables
from petra_zoo.bench.memory import memory_tables
from petra_zoo.bench.pipeline_tables import pipeline_tables
from petra_zoo.bench.results import Results, shown_as
from petra_zoo.bench.speed import speed_tables
from petra_zoo.errors import UserError
from petra_zoo.settings.merging import did_you_mean
from petra_zoo.strict_json import JsonObject

# What a kind of study shows: Markdown by a table's name. These modules import no torch.
TABLES: dict[str, Callable[[Results], dict[str, str]]] = {
    "accuracy": accuracy_tables,
    "conversion": conversion_tables,
    "families": families_tables,
    "faults": faults_tables,
    "finetune": finetuning_tables,
    "gpu": gpu_tables,
    "memory": memory_tables,
    "pipeline": pipeline_tables,
    "speed": speed_tables,
}


def tables(results: Results) -> dict[str, str]:
    """All tables of a results file, by name; `facts`, a line on what they were made with, is one of them.

    Raises:
        UserError: no study of that kind is known, or the file does not hold what one measures.
    """
    if results.kind not in TABLES:
        raise UserError(f"no tables are known of a study of kind '{results.kind}'; expected {', '.join(TABLES)}")
    with shown_as(results):
        return TABLES[results.kind](results) | {"facts": _facts(results)}


def find_table(results: Results, name: str) -> str:
    """One of the tables.

    Raises:
        UserError: there is no such table; gives the nearest.
    """
    found = tables(results)
    if name not in found:
        raise UserError(f"study '{results.study}' has no table '{name}'; {did_you_mean(name, found)}")
    return found[name]


def _facts(results: Results) -> str:
    """How many runs, when, on which machines, with which versions."""
    runs = results.runs
    days = sorted({run.date[:10] for run in runs if run.date})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}" if days else ""
    machines = dict.fromkeys(_machine(run.machine) for run in runs)
    versions = []
    for name in _VERSIONS:
        if values := dict.fromkeys(str(run.versions[name]) for run in runs if name in run.versions):
            versions.append(f"{name} {' and '.join(values)}")
    return "; ".join(part for part in (f"{len(runs)} runs", when, *machines, ", ".join(versions)) if part) + "."


_VERSIONS = ("python", "torch", "timm", "petra-zoo", "commit")


def _machine(facts: JsonObject) -> str:
    """`Intel Xeon, 2 cores, 2 runs at once`."""
    devices = facts.get("devices")
    names = [str(name) for name in devices] if isinstance(devices, list) else []
    jobs = facts.get("jobs", 1)
    parts = [str(facts.get("processor", "")), f"{facts['cores']} cores" if "cores" in facts else "", *names]
    return ", ".join(part for part in (*parts, f"{jobs} runs at once" if jobs != 1 else "") if part)
