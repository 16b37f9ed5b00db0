"""What fine-tuning a transformer costs and gives: the source itself, with timm's checkpointing, and converted.

A small vision transformer is trained here on `shapes`, then fine-tuned on `digits` with a new classifier: all of it, or
low-rank adapters. Pairs share the seed, and with it the source, the new classifier and the order of the images. Peak
bytes per image are counted over one step on the meta device (`step_bytes`).
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import ClassVar, Self

from petra_zoo.bench.accuracy_tables import mean_and_range, shown_interval
from petra_zoo.bench.built_in import BuiltInStudy
from petra_zoo.bench.conversion_jobs import TrainedOn
from petra_zoo.bench.finetuning_jobs import SAVINGS, Trained, TuningJob, tuning_job
from petra_zoo.bench.markdown import group_runs, markdown_table
from petra_zoo.bench.pairs import Interval
from petra_zoo.bench.results import Record, Results, Trial
from petra_zoo.strict_json import JsonObject

KIB = 2**10

SOURCE, TARGET = TrainedOn("shapes", 16, 4, 0.0), TrainedOn("digits", 16, 4, 0.0)


@dataclass(frozen=True)
class FinetuningStudy(BuiltInStudy):
    """Every memory with everything that is trained, seed by seed.

    Attributes:
        source, target: see `TuningJob`.
        rates: by what is trained; without adapters where peft is not installed.
        seeds: of the pairs.
    """

    kind: ClassVar[str] = "finetune"
    shares_the_machine: ClassVar[bool] = True
    source: TrainedOn = SOURCE
    target: TrainedOn = TARGET
    rates: tuple[tuple[Trained, float], ...] = (("all", 5e-4), ("adapters", 5e-3))
    seeds: tuple[int, ...] = (0, 1, 2)

    @classmethod
    def small(cls) -> Self:
        return cls(TrainedOn("digits", 8, 1, 0.0), TrainedOn("digits", 8, 1, 0.0), seeds=(0,), quick=True)

    def trials(self, results: Results) -> Sequence[Trial]:
        return [job.trial for job in self._jobs()]

    def _jobs(self) -> Iterator[TuningJob]:
        """Those of one source one after the other: a worker keeps it."""
        for seed in self.seeds:
            for trained, rate in self.rates:
                if trained == "all" or find_spec("peft") is not None:
                    yield from (TuningJob(memory, trained, self.source, self.target, rate, seed) for memory in SAVINGS)

    def run(self, trial: Trial) -> JsonObject:
        from petra_zoo.bench.finetuning_runs import fine_tuned

        return fine_tuned(tuning_job(trial))


def finetuning_tables(results: Results) -> dict[str, str]:
    """`finetuning`: accuracy, its difference to plain fine-tuning pair by pair, and the peak of a step."""
    columns = [
        "trained",
        "memory",
        "n",
        "top-1, %",
        "minus plain, points",
        "peak of a step, KiB per image",
        "of plain's",
    ]
    by_contender = group_runs([run for run in results.runs if not run.failed], lambda run: run.contender)
    rows = []
    for runs in by_contender.values():
        job = tuning_job(runs[0].trial)
        plain = by_contender.get(f"plain, {job.trained}", [])
        peaks, of_plain = (statistics.mean(run.number("peak_bytes") for run in some) for some in (runs, plain or runs))
        rows.append(
            [
                job.trained,
                job.memory,
                str(len(runs)),
                mean_and_range([run.number("top1") for run in runs]),
                "" if job.memory == "plain" else _difference(runs, plain),
                f"{peaks / KIB:.1f}",
                f"{peaks / of_plain:.2f}",
            ]
        )
    return {"finetuning": markdown_table(columns, rows)}


def _difference(runs: Sequence[Record], plain: Sequence[Record]) -> str:
    theirs = {run.repeat: run.number("top1") for run in plain}
    differences = [run.number("top1") - theirs[run.repeat] for run in runs if run.repeat in theirs]
    return shown_interval(Interval.of(differences)) if differences else ""
