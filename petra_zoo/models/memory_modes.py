"""What a model's training step stores: the switch that every reversible model of the zoo has."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from petra_zoo.reversible import needs_plain_path

Memory = Literal["reversible", "recompute", "plain"]


class MemoryModes:
    """Mixin of reversible models: `set_memory` and timm's `set_grad_checkpointing`."""

    memory = "reversible"  # no annotation: TorchScript would have to resolve it

    @torch.jit.ignore
    def set_memory(self, memory: Memory) -> None:
        """Chooses what training stores.

        Args:
            memory: ``'reversible'``: the ends of runs and the inputs of other units; ``'recompute'``: the input of
                every unit (activation checkpointing); ``'plain'``: all activations.

        Raises:
            ValueError: no such mode.
        """
        if memory not in ("reversible", "recompute", "plain"):
            raise ValueError(f"memory is 'reversible', 'recompute' or 'plain', not {memory!r}")
        self.memory = memory

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """timm's switch. A reversible model already stores less; a plain one recomputes every unit."""
        if enable and self.memory == "plain":
            self.set_memory("recompute")
        elif not enable and self.memory == "recompute":
            self.set_memory("plain")


def saves_memory(module: nn.Module, x: Tensor) -> bool:
    """Whether a module with a `memory` mode should run through `petra_zoo.reversible.backpropagate` now."""
    if module.memory == "plain" or (module.memory == "reversible" and not module.training):
        return False
    return not needs_plain_path(module, x)
