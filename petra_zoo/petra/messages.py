"""What neighbouring stages send each other, and what a tick gives."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from petra_zoo.reversible import Gradients, Streams


@dataclass
class Up:
    """Stage j -> j + 1: the output of stage j for a micro-batch; its labels travel along to the last stage."""

    micro_batch: int
    streams: Streams
    labels: Tensor


@dataclass
class Down:
    """Stage j + 1 -> j: the reconstructed output of stage j and the gradient of the loss with respect to it.

    `streams` is empty where stage j does not reconstruct from it.
    """

    micro_batch: int
    streams: Streams
    gradients: Gradients


@dataclass
class Output:
    """What a tick gives: the micro-batch that reached the head.

    None everywhere while the pipeline fills, and on ranks that do not own the head.
    """

    micro_batch: int | None = None
    loss: Tensor | None = None  # 0-d
    logits: Tensor | None = None  # [B, classes]
    labels: Tensor | None = None
