"""What the conversion study shows: couplings, errors and memory of networks; fidelity of small trained ones."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import TypeAdapter

from petra_zoo.bench.conversion_jobs import FidelityJob, NetworkJob, job_of
from petra_zoo.bench.markdown import group_runs, markdown_table
from petra_zoo.bench.results import Record, Results

MIB = 2**20
FLOAT32_ERROR = 6e-8  # relative, of one rounding


@dataclass(frozen=True)
class _Inverted:
    """A run of reversible blocks, as `petra_zoo.converters.CoupledRun` has it."""

    layer: str
    blocks: int
    g: float
    anchor_every: int
    error: float

    @property
    def predicted_error(self) -> float:
        """By the rule of thumb: every block that is inverted in a row makes it 1/g times as large."""
        inverted = self.anchor_every or self.blocks
        return FLOAT32_ERROR * self.g**-inverted if self.g and inverted else 0.0


_INVERTED, _MEMORY = TypeAdapter(list[_Inverted]), TypeAdapter(dict[str, dict[str, int]])


def conversion_tables(results: Results) -> dict[str, str]:
    """`networks` and `fidelity`, where there are runs."""
    runs = [(job_of(run.trial), run) for run in results.runs if not run.failed]
    networks = [(job, run) for job, run in runs if isinstance(job, NetworkJob)]
    trained = [run for job, run in runs if isinstance(job, FidelityJob)]
    found = {"networks": _networks(networks)} if networks else {}
    return found | ({"fidelity": _fidelity(trained)} if trained else {})


def _networks(runs: Sequence[tuple[NetworkJob, Record]]) -> str:
    columns = ["network", "for", "g per run (blocks)", "anchors", "predicted", "measured", "stored: source",
               "checkpointed", "converted", "peak: source", "checkpointed", "converted"]  # fmt: skip
    rows = []
    for job, run in runs:
        inverted = _INVERTED.validate_python(run.result["runs"])
        some = [found for found in inverted if found.blocks]
        memory = _MEMORY.validate_python(run.result["bytes_per_image"])
        rows.append(
            [
                run.contender,
                job.purpose,
                ", ".join(f"{found.g:g} ({found.blocks})" for found in some),
                "; ".join(f"{found.layer} every {found.anchor_every}" for found in some if found.anchor_every) or "-",
                f"{max(found.predicted_error for found in some):.0e}",
                f"{max(found.error for found in some):.0e}",
                *(f"{use[kind] / MIB:.1f}" for kind in ("stored", "peak") for use in memory.values()),
            ]
        )
    return markdown_table(columns, rows)


def _fidelity(runs: Sequence[Record]) -> str:
    """Means over the seeds, and the worst seed of what may not get worse."""
    columns = ["data", "g", "statistics", "top-1 source", "top-1 converted", "agreement, mean (worst)", "logit error",
               "KL", "largest reconstruction error"]  # fmt: skip
    rows = []
    for group in group_runs(runs, lambda run: f"{run.settings['data']} {run.contender}").values():
        settings = group[0].settings

        def mean(name: str, digits: int, group: list[Record] = group) -> str:
            return f"{statistics.mean(run.number(name) for run in group):.{digits}f}"

        rows.append(
            [
                str(settings["data"]),
                str(settings["coupling"]),
                "estimated anew" if settings["estimated"] else "kept",
                mean("source_top1", 2),
                mean("converted_top1", 2),
                f"{mean('agreement', 2)} ({min(run.number('agreement') for run in group):.2f})",
                mean("logit_error", 3),
                mean("kl", 4),
                f"{max(run.number('largest_error') for run in group):.0e}",
            ]
        )
    return markdown_table(columns, rows)
