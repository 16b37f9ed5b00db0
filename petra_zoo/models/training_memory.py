"""How many bytes of activations a training step needs per image, without running one.

The step runs on the meta device, where tensors have sizes but no content: a second for a ResNet-50, the same number on
every machine. Counted is what is alive at the worst moment, recomputed activations and gradients of activations
included. Not counted: parameters, their gradients, and the workspace that a convolution takes inside its kernel.
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from petra_zoo.models.memory_modes import Memory, MemoryModes
from petra_zoo.reversible import LiveBytes, Streams, UnitModel, backpropagate, units_of

BATCH = 2**20  # so many that what belongs to no image, such as a weight's gradient, has no part in the quotient


@dataclass(frozen=True)
class ActivationMemory:
    """Peak bytes of activations per image in a training step, in the weights' own type.

    Attributes:
        plain: all activations stored.
        checkpointed: the input of every unit stored, the rest recomputed.
        reversible: runs reconstructed, other units recomputed.
    """

    plain: int
    checkpointed: int
    reversible: int

    def as_dict(self) -> dict[str, int]:
        """For JSON."""
        return asdict(self)


def activation_memory(model: nn.Module | UnitModel, input_size: tuple[int, int, int]) -> ActivationMemory:
    """Peak bytes of activations per image in a training step of a model with units, in each of three ways.

    Args:
        model: on any device; it is left as it is.
        input_size: channels, height and width of an image.

    Raises:
        UserError: see `petra_zoo.reversible.units_of`.
    """
    meta = copy.deepcopy(model).to("meta")

    def peak(memory: Memory) -> int:
        if isinstance(meta, MemoryModes):
            meta.set_memory(memory)
            return step_bytes(meta, input_size).peak
        return step_bytes(_ByUnits(meta, memory), input_size).peak

    return ActivationMemory(plain=peak("plain"), checkpointed=peak("recompute"), reversible=peak("reversible"))


class _ByUnits(nn.Module):
    """A network of somebody's own, whose training step stores what a mode says."""

    def __init__(self, model: nn.Module | UnitModel, memory: Memory) -> None:
        super().__init__()
        self.model, self.memory = model, memory

    def forward(self, x: Tensor) -> Tensor:
        units = units_of(self.model)
        streams: Streams = (x,)
        if self.memory != "plain":
            return backpropagate(units, streams, reconstruct=self.memory == "reversible")[0]
        for unit in units:
            streams = unit(*streams)
        return streams[0]


class StepBytes(NamedTuple):
    """Bytes of activations per image in a training step, in the weights' own type.

    Attributes:
        stored: alive between the forward and the backward pass.
        peak: alive at the worst moment.
    """

    stored: int
    peak: int


def step_bytes(network: nn.Module | UnitModel, input_size: tuple[int, int, int]) -> StepBytes:
    """Bytes of activations per image in a training step of any network of images, as it is set up.

    Args:
        network: on any device; it is left as it is.
        input_size: channels, height and width of an image.
    """
    meta = copy.deepcopy(network).to("meta").train()
    for p in meta.parameters():
        p.grad = torch.zeros_like(p)
    images = torch.empty(BATCH, *input_size, device="meta")
    with LiveBytes([*meta.parameters(), *meta.buffers()]) as memory:
        logits = meta(images)
        stored = memory.now
        logits.sum().backward()
    return StepBytes(stored // BATCH, memory.peak // BATCH)
