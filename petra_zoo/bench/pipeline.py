"""PETRA on two processes beside torch's pipelines, DDP and plain training: images per second and peak live bytes.

Three parts, each a run for every contender:

    speed    the contender and its references (plain backpropagation in one process; `capacity`: two of them at once
             that do not know each other) live in the same two gloo processes, one thread each, and take turns, round
             by round, a block of updates between two barriers, the optimizer's step included
    memory   live bytes that the contender makes in each process from its construction on, gradients and optimizer
             state included, parameters, batch-norm buffers and images apart; and what `petra-zoo plan` predicts
    plan     images per second that `petra-zoo plan` predicts, from a profile measured in both processes at once, and
             those of the contender right after it, round by round
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import ClassVar

from petra_zoo.bench.results import Results
from petra_zoo.bench.steps import number_of
from petra_zoo.bench.study import Study, Trial, interleaved
from petra_zoo.strict_json import Json, JsonObject

BASELINE, CAPACITY = "backprop, 1 thread", "capacity"
ALONE = (BASELINE, "backprop, 2 threads", "reversible", CAPACITY)  # their speed does not depend on m: the first counts
SHARING = ("DDP x 2", "GPipe", "1F1B", "1F1B + checkpointing", "petra", "dsp", "delayed")
WITHOUT_LINKS = "petra without links"  # at the last m
CONTENDERS = (*ALONE, *SHARING, WITHOUT_LINKS)
# What `petra-zoo plan` calls those that it predicts.
PLANNED = {
    "GPipe": "gpipe",
    "1F1B": "1f1b",
    "1F1B + checkpointing": "1f1b+checkpoint",
    "petra": "petra",
    "dsp": "dsp",
    "delayed": "delayed",
}
OURS = ("petra", "dsp", "delayed", WITHOUT_LINKS)


@dataclass(frozen=True)
class Task:
    """The network and its data: stem, reversible blocks of fixed width, head.

    Attributes:
        blocks: how many. Whole units can be divided evenly both in halves and in PETRA's ratio of 3 to 4 where their
            number is 24.
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
    """What the processes of a run are told.

    Attributes:
        part: ``'speed'``, ``'memory'`` or ``'plan'``.
        micro_batches: per update, m; or k of ours.
        processes: how many there are.
        rounds: how often what is timed takes turns.
        updates: in a block that is timed.
        reference_micro_batches: m of the references.
    """

    contender: str
    part: str
    micro_batches: int
    processes: int = 2
    rounds: int = 6
    updates: int = 2
    reference_micro_batches: int = 4
    task: Task = Task()

    @property
    def trial(self) -> Trial:
        """The run that this is."""
        return Trial(self.contender, 0, {k: v for k, v in asdict(self).items() if k != "contender"})


@dataclass(frozen=True)
class PipelineStudy(Study):
    """Every contender with every number of micro-batches per update.

    Attributes:
        micro_batches: m, or k of ours.
        memory_processes: memory is also counted with so many processes.
        only: the parts to run.
    """

    kind: ClassVar[str] = "pipeline"
    task: Task = Task()
    micro_batches: tuple[int, ...] = (4, 8)
    rounds: int = 6
    updates: int = 2
    memory_processes: tuple[int, ...] = (2, 4)
    parts: tuple[str, ...] = ("speed", "memory", "plan")
