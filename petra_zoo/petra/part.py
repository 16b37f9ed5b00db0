"""What a stage is made from: its part of the network, and what all stages of a pipeline share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from petra_zoo.petra.fifo import MakeFifo, queue
from petra_zoo.petra.finite import FiniteCheck
from petra_zoo.petra.optimization import Optimization
from petra_zoo.reversible import Unit

Loss = Callable[[Tensor, Tensor], Tensor]
Shapes = Sequence[Sequence[torch.Size]]  # of the streams that each unit gives


@dataclass(frozen=True)
class StageSettings:
    """What all stages of a pipeline share.

    Attributes:
        first_trainable: index of the first unit with a parameter to train; nobody wants gradients below it.
        last_keeps_graph: whether the last stage keeps its graph within the tick.
        across: process group of a stage in every replica of the pipeline; None where there is one.
        patience: for how long another replica may be silent: it may wait for data.
        static: whether everything lies at fixed addresses, so that ticks may be captured.
        finite: looks at losses and gradients.
    """

    loss: Loss
    optimization: Optimization
    seed: int = 0
    autocast: torch.dtype | None = None
    first_trainable: int = 0
    last_keeps_graph: bool = True
    across: ProcessGroup | None = None
    patience: timedelta = timedelta(minutes=10)
    static: bool = False
    finite: FiniteCheck = field(default_factory=FiniteCheck)


@dataclass(frozen=True)
class Part:
    """Which part of a network a stage has.

    Attributes:
        units: consecutive ones.
        index: which stage of the pipeline it is, from 0.
        first_unit: index of the first unit in the model.
        last: whether it is the last stage, which has no delay.
        sends_streams: whether the stage below reconstructs, that is, wants to be sent its output back.
        shapes: gives the shapes of every unit's output for one image, for stages with modules of their own; computed
            when first asked for.
        fifo: makes an empty FIFO, for what the stage keeps from a forward to its backward.
    """

    units: Sequence[Unit]
    index: int
    first_unit: int
    last: bool
    sends_streams: bool
    shapes: Callable[[], Shapes]
    fifo: MakeFifo = queue
