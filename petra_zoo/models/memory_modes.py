"""What a model's training step stores: the switch that every reversible model of the zoo has."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from petra_zoo.models.layer_arguments import Argument
from petra_zoo.reversible import (
    CompileOptions,
    StreamKind,
    Streams,
    Unit,
    backpropagate,
    compile_branches,
    kept_units,
    needs_plain_path,
    units_of,
)

Memory = Literal["reversible", "recompute", "plain"]


class MemoryModes:
    """Mixin of reversible models: `set_memory`, timm's `set_grad_checkpointing`, and `set_streams`."""

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
    def compile_branches(self, backend: str = "inductor", mode: str | None = None) -> None:
        """Compiles the blocks' branches, in training: in the forward, and where they are reversed or recomputed.

        Memory stays that of the mode, which torch.compile of the whole network gives up. The first step compiles, once
        for each structure of block. Evaluation, export and networks with module hooks run as ever. A compiled branch
        rounds in other places than its operations, so start, resume and compare runs with the same setting.

        Args:
            backend: torch.compile's.
            mode: torch.compile's; not one that replays CUDA graphs.

        Raises:
            UserError: the mode is one of those.
        """
        assert isinstance(self, nn.Module)
        compile_branches(self, CompileOptions(backend, mode))

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """timm's switch. A reversible model already stores less; a plain one recomputes every unit."""
        if enable and self.memory == "plain":
            self.set_memory("recompute")
        elif not enable and self.memory == "recompute":
            self.set_memory("plain")

    @torch.jit.unused
    def set_streams(self, streams: StreamKind) -> None:
        """Chooses what carries the streams, in this network and in copies that are saved.

        Args:
            streams: ``'float32'``; ``'bfloat16'``: half the memory, and rounded once per block; ``'fixed16'``: a grid
                in 16 bits, whose inverse is exact to the bit, for g = 1; ``'auto'``: float32, but where branches
                compute in bfloat16 (autocast or weights) bfloat16 at g = 1 and 0.

        Raises:
            UserError: no such kind, or one that does not go with exact inversion.
        """
        self._use_streams(streams)
        self._is_built_with("streams", None if streams == "auto" else streams)

    @torch.jit.unused
    def _is_built_with(self, name: str, value: Argument | None) -> None:
        """Notes an argument for timm's config.json, which a network like this one is built by; None: none is needed."""
        arguments = {key: other for key, other in getattr(self, "_model_args", {}).items() if key != name}
        self._model_args = arguments if value is None else {**arguments, name: value}

    @torch.jit.unused
    def _use_streams(self, streams: StreamKind) -> None:
        raise NotImplementedError

    @torch.jit.unused
    def _run_units(self, units: list[Unit], x: Tensor) -> Streams:
        """The network's output by its units, which store what its memory mode says."""
        reconstruct = self.memory == "reversible"
        kept = kept_units(units, x) if reconstruct else 0
        return backpropagate(units, (x,), reconstruct=reconstruct, kept=kept)

    @torch.jit.unused
    def _goes_by_units(self, x: Tensor) -> bool:
        """Whether a training step stores what its units need, stem and head included, and nothing else."""
        assert isinstance(self, nn.Module)
        return (
            not self._goes_beyond_units("forward_features", "forward_head")
            and saves_memory(self, x)
            and self._is_all_in_units()
        )

    @torch.jit.unused
    def _is_all_in_units(self) -> bool:
        """Whether the units have all parameters; a subclass may use some of its own in its stem or head."""
        if "units" in vars(type(self)):
            return True
        assert isinstance(self, nn.Module)
        known = {id(p) for unit in self._all_units() for p in unit.parameters()}
        return all(id(p) in known for p in self.parameters())

    @torch.jit.unused
    def _all_units(self) -> list[Unit]:
        assert isinstance(self, nn.Module)
        return units_of(self)

    @torch.jit.unused
    def _goes_beyond_units(self, *names: str) -> bool:
        """Whether any of these methods is not that of the class that defines `units`, which would leave it out."""
        own = next(kind for kind in type(self).__mro__ if "units" in vars(kind))
        return any(getattr(type(self), name) is not getattr(own, name) or name in vars(self) for name in names)

    @torch.jit.unused
    def _check_units(self) -> None:
        if self._goes_beyond_units("forward_features"):
            raise NotImplementedError(f"{type(self).__name__} has its own forward_features: define its units() as well")


def saves_memory(module: nn.Module, x: Tensor) -> bool:
    """Whether a module with a `memory` mode should run through `petra_zoo.reversible.backpropagate` now."""
    if module.memory == "plain" or (module.memory == "reversible" and not module.training):
        return False
    return not needs_plain_path(module, x)
