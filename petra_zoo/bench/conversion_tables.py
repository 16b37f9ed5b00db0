"""What the conversion study shows: couplings, errors and memory of networks; fidelity of small trained ones."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import TypeAdapter

from petra_zoo.bench.conversion_jobs import FidelityJob, NetworkJob, TransformerJob, job_of
from petra_zoo.bench.markdown import group_runs, markdown_table
from petra_zoo.bench.results import Record, Results

KIB, MIB = 2**10, 2**20
STORED_BITS = (1, 2, 4, 8)  # per element
FLOAT32_ERROR = 6e-8  # relative, of one rounding


@dataclass(frozen=True)
class _Inverted:
    """A run of reversible blocks, as `petra_zoo.converters.CoupledRun` has it."""

    layer: str
    blocks: int
    g: float
    anchor_every: int
    error: float
    bits: int = 0

    @property
    def kept(self) -> float:
        """What is kept of a run beside its end, per unit, in parts of a float32 stream: bits, or pairs of streams."""
        if self.bits:
            return next(size for size in STORED_BITS if size >= self.bits) / 32
        pairs = (self.blocks - 1) // self.anchor_every if self.anchor_every else 0
        return 2 * pairs / self.blocks if self.blocks else 0.0

    @property
    def predicted_error(self) -> float:
        """By the rule of thumb: every block that is inverted in a row makes it 1/g times as large."""
        inverted = self.anchor_every or self.blocks
        return FLOAT32_ERROR * self.g**-inverted if self.g and inverted else 0.0


_INVERTED, _MEMORY = TypeAdapter(list[_Inverted]), TypeAdapter(dict[str, dict[str, int]])


def conversion_tables(results: Results) -> dict[str, str]:
    """`networks`, `fidelity` and `transformers`, where there are runs."""
    runs = [(job_of(run.trial), run) for run in results.runs if not run.failed]
    networks = [(job, run) for job, run in runs if isinstance(job, NetworkJob)]
    trained = [run for job, run in runs if isinstance(job, FidelityJob)]
    transformers = [(job, run) for job, run in runs if isinstance(job, TransformerJob)]
    found = {"networks": _networks(networks)} if networks else {}
    found |= {"fidelity": _fidelity(trained)} if trained else {}
    return found | ({"transformers": _transformers(transformers)} if transformers else {})


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
        statistics_are = "estimated anew" if settings["estimated"] else "kept"
        rows.append([str(settings["data"]), str(settings["coupling"]), statistics_are, *_scores(group)])
    return markdown_table(columns, rows)


def _transformers(runs: Sequence[tuple[TransformerJob, Record]]) -> str:
    """Likewise, of the conversions of a transformer."""
    columns = ["data", "g", "inverse", "kept per unit", "peak: source", "checkpointed", "converted", "top-1 source",
               "top-1 converted", "agreement, mean (worst)", "logit error", "KL",
               "largest reconstruction error"]  # fmt: skip
    jobs = {run.contender: job for job, run in runs}
    rows = []
    for group in group_runs([run for _, run in runs], lambda run: run.contender).values():
        job = jobs[group[0].contender]
        found = [_INVERTED.validate_python(run.result["runs"])[0] for run in group]
        every = sorted({run.anchor_every for run in found})
        inverse = f"{found[0].bits} bits" if job.inverse == "bits" else (
            f"anchors every {' or '.join(map(str, every))}" if any(every) else "-")  # fmt: skip
        memory = _MEMORY.validate_python(group[0].result["bytes_per_image"])
        peaks = [f"{use['peak'] / KIB:.0f}" for use in memory.values()]
        kept = f"{statistics.mean(run.kept for run in found):.3f}"
        rows.append([job.source.data, f"{job.coupling:g}", inverse, kept, *peaks, *_scores(group)])
    return markdown_table(columns, rows)


def _scores(group: Sequence[Record]) -> list[str]:
    """The last six columns of a table of fidelity."""

    def mean(name: str, digits: int) -> str:
        return f"{statistics.mean(run.number(name) for run in group):.{digits}f}"

    return [
        mean("source_top1", 2),
        mean("converted_top1", 2),
        f"{mean('agreement', 2)} ({min(run.number('agreement') for run in group):.2f})",
        mean("logit_error", 3),
        mean("kl", 4),
        f"{max(run.number('largest_error') for run in group):.0e}",
    ]
