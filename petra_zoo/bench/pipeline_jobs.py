"""Contenders of the pipeline study, and what the processes of a run are told. Imports no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from pydantic import TypeAdapter

from petra_zoo.bench.results import Trial
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
        task = _TASK.validate_python(trial.settings)
        return _JOB.validate_python({"contender": trial.contender, "task": task, **trial.settings})


_TASK, _JOB = TypeAdapter(PipelineTask), TypeAdapter(PipelineJob)
