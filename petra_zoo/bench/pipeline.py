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
from dataclasses import asdict, dataclass
from typing import ClassVar, Self

from pydantic import TypeAdapter

from petra_zoo.bench.built_in import BuiltInStudy
from petra_zoo.bench.results import Results, Trial
from petra_zoo.strict_json import JsonObject

BASELINE, CAPACITY = "backprop, 1 thread", "capacity"
ALONE = (BASELINE, "backprop, 2 threads", "reversible", CAPACITY)  # at the first m, which their speed does not need
OURS = ("delayed", "dsp", "petra")
SHARING = ("DDP x 2", "GPipe", "1F1B", "1F1B + checkpointing", *OURS)
WITHOUT_LINKS = "petra without links"  # at the last m
# What `petra-zoo plan` calls those that it predicts.
PLANNED = {
    "GPipe": "gpipe",
    "1F1B": "1f1b",
    "1F1B + checkpointing": "1f1b+checkpoint",
    **{method: method for method in OURS},
}
VALIDATED = ("petra", "1F1B")


@dataclass(frozen=True)
class PipelineTask:
    """The network and its data: stem, reversible blocks of fixed width, head.

    Attributes:
        blocks: how many; with 24, whole units can be divided evenly both in halves and in PETRA's ratio of 3 to 4.
        channels: of a stream.
        batch_size: images per micro-batch.
    """

    blocks: int = 24
    channels: int = 32
    img_size: int = 32
    batch_size: int = 8
    classes: int = 10

    @property
    def input_size(self) -> tuple[int, int, int]:
        """[C, H, W] of an image."""
        return 3, self.img_size, self.img_size


@dataclass(frozen=True)
class PipelineJob:
    """A run: what each of its processes is told, and in JSON the settings of a trial.

    Attributes:
        part: ``'speed'``, ``'memory'`` or ``'plan'``.
        m: micro-batches per update, or k of ours.
        reference_m: likewise of the references.
        rounds: how often what is timed takes turns.
        updates: in a block that is timed.
    """

    contender: str
    part: str
    m: int
    task: PipelineTask
    processes: int = 2
    reference_m: int = 1
    rounds: int = 1
    updates: int = 2

    @property
    def trial(self) -> Trial:
        """Says all of it."""
        timed: JsonObject = {"reference_m": self.reference_m, "rounds": self.rounds, "updates": self.updates}
        settings: JsonObject = {"part": self.part, "m": self.m, "processes": self.processes, **asdict(self.task)}
        return Trial(self.contender, 0, settings if self.part == "memory" else {**settings, **timed})

    @property
    def label(self) -> str:
        """The contender with its number of micro-batches, where that tells it from others."""
        if self.contender in ALONE:
            return self.contender
        return f"{self.contender}, {'k' if self.contender in (*OURS, WITHOUT_LINKS) else 'm'}={self.m}"

    @classmethod
    def of(cls, trial: Trial) -> PipelineJob:
        """What `trial` says."""
        task = TypeAdapter(PipelineTask).validate_python(trial.settings)
        return TypeAdapter(cls).validate_python({"contender": trial.contender, "task": task, **trial.settings})


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
    task: PipelineTask = PipelineTask()
    ms: tuple[int, ...] = (4, 8)
    rounds: int = 6
    updates: int = 2
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
