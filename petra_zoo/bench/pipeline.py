"""PETRA on two processes beside torch's pipelines, DDP and plain training: images per second and peak live bytes.

Three parts, each a run for every contender:

    speed    the contender and its references (plain backpropagation in one process; `capacity`: two of them at once
             that do not know each other) live in the same two gloo processes, one thread each, and take turns, round
             by round, a block of updates between two barriers, the optimizer's step included
    memory   live bytes that the contender makes in each process from its construction on, gradients and optimizer
             state included, parameters, batch-norm buffers and images apart; and what `petra-zoo plan` predicts
    plan     images per second that `petra-zoo plan` predicts, from a profile measured in both processes at once, and
             the contender's own right after it, round by round
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Self

from petra_zoo.bench.built_in import BuiltInStudy
from petra_zoo.bench.pipeline_jobs import ALONE, PLANNED, SHARING, WITHOUT_LINKS, PipelineJob, PipelineTask
from petra_zoo.bench.results import Results, Trial
from petra_zoo.strict_json import JsonObject

VALIDATED = ("petra", "1F1B")  # the plan's predictions of these are compared with what they do


@dataclass(frozen=True)
class PipelineStudy(BuiltInStudy):
    """Every contender with every number of micro-batches per update.

    Attributes:
        ms: micro-batches per update, m; k of ours.
        rounds: how often what is timed takes turns.
        updates: in a block that is timed.
        memory_processes: with how many processes memory is counted.
    """

    kind: ClassVar[str] = "pipeline"
    task: PipelineTask = field(default_factory=PipelineTask)
    ms: tuple[int, ...] = (4, 8)
    rounds: int = 10
    updates: int = 1
    memory_processes: tuple[int, ...] = (2, 4)

    @classmethod
    def small(cls) -> Self:
        task = PipelineTask(blocks=6, channels=4, img_size=8, batch_size=2)
        return cls(task, ms=(4,), rounds=2, updates=1, memory_processes=(2,), quick=True)

    def trials(self, results: Results) -> Sequence[Trial]:
        return [job.trial for job in self._jobs()]

    def _jobs(self) -> Iterator[PipelineJob]:
        first, last = self.ms[0], self.ms[-1]
        alone = [(name, first) for name in ALONE]
        sharing = [(name, m) for m in self.ms for name in SHARING]
        for name, m in (*alone, *sharing, (WITHOUT_LINKS, last)):
            yield self._timed(name, "speed", m)
        for processes in self.memory_processes:
            for name, m in (*alone, *sharing):
                if processes == 2 or name in PLANNED:
                    yield PipelineJob(name, "memory", m, self.task, processes)
        for name in VALIDATED:
            yield self._timed(name, "plan", last)

    def _timed(self, name: str, part: str, m: int) -> PipelineJob:
        return PipelineJob(name, part, m, self.task, 2, self.ms[0], self.rounds, self.updates)

    def run(self, trial: Trial) -> JsonObject:
        from petra_zoo.bench.pipeline_runs import in_processes

        return in_processes(PipelineJob.of(trial))
