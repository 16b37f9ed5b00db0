"""Layers of timm's ResNet with a coupling: the part of a reversible ResNet that is reversible."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple, Optional, overload

import torch
from torch import Tensor, nn

from petra_zoo.models.coupled_block import CoupledBlock, check_activation, couple_block, is_coupled, is_zero
from petra_zoo.models.layer_parts import (
    Behind,
    Enter,
    Foreign,
    InFront,
    LastActivation,
    Leaving,
    Merge,
    Opening,
    first_stream,
    unchanged,
)
from petra_zoo.models.memory_modes import Memory, saves_memory
from petra_zoo.models.run_buffers import RunBuffers
from petra_zoo.reversible import (
    CoupledUnit,
    Coupling,
    FunctionUnit,
    StreamKind,
    Streams,
    Unit,
    backpropagate,
    merge,
    needs_plain_path,
)
from petra_zoo.reversible.stream_type import scripted_kind, scripted_snap, to_carrier


class Position(NamedTuple):
    """A block's part in its layer."""

    name: str
    block: nn.Module
    in_run: bool  # has an inverse where g > 0; a coupled block that is not in a run opens the layer
    run_index: int  # 0: starts its run


class CoupledLayer(RunBuffers):
    """A ResNet layer whose blocks, behind the down-sampling one, form a run of coupled blocks.

    Takes and gives activations [B, C, H, W], like timm's layers: the run starts and ends inside. In train mode it
    stores no activations inside the run (see `memory`). The coupling is a buffer, in the state dict as ``coupling``;
    a state dict without one is a plain ResNet's and sets it to 0. Beside it lies ``exponent``: the grid of fixed16
    streams is 2**-exponent (8 where a state dict has none). Blocks may be removed, replaced, appended and sliced
    like those of timm's layers: what is no coupled block (`couple_block` makes one) counts as a unit without an
    inverse, and ends the run before it.

    Args:
        blocks: timm BasicBlocks or Bottlenecks; they are turned into their coupled form in place.
        behind_stem: the layer's input is the stem's output, so that its first block may start the run.
        coupling: g, a multiple of 1/256 in [0, 1]; None: 1, and whatever a checkpoint says.
        anchor_every: keep the streams every so many blocks of the run; 0: never.
        grid: > 0 makes the inversion exact at g = 2**-m (see `petra_zoo.reversible.StreamType`).
        streams: what carries the streams (likewise).
    """

    if TYPE_CHECKING:

        def __iter__(self) -> Iterator[CoupledBlock]: ...  # or what somebody has put in a block's place

    def __init__(
        self,
        *blocks: nn.Module,
        behind_stem: bool = False,
        coupling: float | None = None,
        anchor_every: int = 0,
        grid: float = 0.0,
        streams: StreamKind = "auto",
    ) -> None:
        super().__init__([couple_block(block) for block in blocks], coupling, grid, streams)
        # Whether block 0 is in the run (TorchScript: an attribute).
        first = self[0]
        self.starts = behind_stem and first.downsample is None and _idempotent(first.activate)
        self.anchor_every = anchor_every
        self.memory: Memory = "reversible"

    if TYPE_CHECKING:

        @overload
        def __getitem__(self, idx: slice) -> CoupledLayer: ...

        @overload
        def __getitem__(self, idx: int) -> CoupledBlock: ...

        def __getitem__(self, idx: int | slice) -> nn.Module: ...

    @torch.jit.unused
    def with_blocks(self, blocks: Mapping[str, nn.Module]) -> CoupledLayer:
        """A layer of other blocks that shares this one's coupling."""
        other = super().with_blocks(blocks)
        other.starts = self.starts and len(other) > 0 and other[0] is self[0]
        return other

    # -- forward --------------------------------------------------------------------------------------------------

    def forward(self, h: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            g: Coupling = float(torch.round(self.coupling.float() * 256.0)) / 256.0
        else:
            if saves_memory(self, h):
                return self._forward_units(h)
            if self._packs(h):
                return self._forward_packed(h)
            g = self._coupling_now()
        return self._forward_plainly(h, g)

    def _forward_plainly(self, h: Tensor, g: Coupling) -> Tensor:
        """The blocks one after the other, as ordinary operations; the one copy of the loop that TorchScript has."""
        dtype = h.dtype
        kind, grid = "float32", self.grid
        if torch.jit.is_scripting():  # it knows no `StreamType`
            kind = scripted_kind(self.kind, float(g), self.grid, dtype)
            if kind == "fixed16":
                grid = float(torch.pow(torch.tensor(2.0), -self.exponent.float()))
            b = to_carrier(h, kind)
            if self.starts:
                b = scripted_snap(b, kind, grid)
        else:
            streams = self.streams().as_floats()
            b = streams.enter(h) if self.starts else streams.carry(h)
        h = b
        a: Optional[Tensor] = None  # noqa: UP045 - TorchScript; inside a run, the stream a and act(a)
        h_before: Optional[Tensor] = None  # noqa: UP045
        for i, block in enumerate(self):
            if hasattr(block, "coupled_step"):
                in_run = block.downsample is None and (i > 0 or self.starts)
                if not in_run and h_before is not None:  # the block behind a run reads one activation
                    h = merge(h, h_before, g)
                    a = None
                    h_before = None
                if torch.jit.is_scripting():
                    out = block.scripted(h, a, g, kind, grid)
                else:
                    out = block(h, a, g, streams)
                if is_zero(g):
                    b = out
                    h = out
                else:
                    if in_run:  # a' = b, which is h in front of the run's first block: there a = h
                        a = b
                        h_before = h
                    b = out
                    h = block.activate(b)
            else:
                if h_before is not None:
                    h = merge(h, h_before, g)
                    a = None
                    h_before = None
                if torch.jit.is_scripting():
                    b = scripted_snap(to_carrier(block(h.to(dtype)), kind), kind, grid)
                else:
                    b = streams.enter(block(streams.for_branch(h, block)))
                h = b
        if h_before is not None:
            h = merge(h, h_before, g)
        if torch.jit.is_scripting():
            return h.to(dtype)
        else:
            return streams.leave(h, self)

    @torch.jit.unused
    def _forward_units(self, h: Tensor) -> Tensor:
        units, leave = self.units("layer", first_stream)
        units.append(FunctionUnit("merge", lambda *streams: (leave(*streams),), {}))
        for unit in units:
            unit.outside = (self,)
        return backpropagate(units, (self.enter(h),), reconstruct=self.memory == "reversible")[0]

    @torch.jit.unused
    def _packs(self, h: Tensor) -> bool:
        """Whether activations are stored, and streams may be bits: half as wide, where nobody looks."""
        packs = self.memory == "plain" and self.training and self.streams().kind == "fixed16"
        return packs and not needs_plain_path(self, h)

    @torch.jit.unused
    def _forward_packed(self, h: Tensor) -> Tensor:
        units, leave = self.units("layer", first_stream)
        streams: Streams = (self.enter(h),)
        for unit in units:
            streams = unit(*streams)
        return leave(*streams)

    @torch.jit.unused
    def enter(self, h: Tensor) -> Tensor:
        """The stream b that an activation becomes in front of the layer's first unit."""
        streams = self.streams()
        return streams.enter(h) if self.starts else streams.carry(h)

    # -- units ----------------------------------------------------------------------------------------------------

    @torch.jit.unused
    def positions(self) -> list[Position]:
        """The blocks' parts, as the layer stands now."""
        found: list[Position] = []
        run_index = -1
        for i, (name, block) in enumerate(self._modules.items()):
            in_run = is_coupled(block) and block.downsample is None and (i > 0 or self.starts)
            run_index = run_index + 1 if in_run else -1
            found.append(Position(name, block, in_run, max(0, run_index)))
        return found

    @torch.jit.unused
    def in_run(self) -> list[int]:
        """Indices of the blocks that have an inverse where g > 0."""
        return [i for i, position in enumerate(self.positions()) if position.in_run]

    @torch.jit.unused
    def units(self, name: str, enter: Enter) -> tuple[list[Unit], Enter]:
        """The layer's blocks as units.

        Args:
            name: the layer's name in its model.
            enter: what the first unit applies to the streams it gets (the merge of the layer before).

        Returns:
            The units, and what turns the last one's streams into the activation [B, C, H, W] that the layer hands on.
        """
        units: list[Unit] = []
        every = self.spacing()
        before: Enter = enter if self.starts else InFront(enter, self.streams)  # from the streams in front to h
        for key, block, in_run, run_index in self.positions():
            unit = f"{name}.{key}"
            if isinstance(block, CoupledBlock):
                check_activation(block, unit)
            if in_run and is_coupled(block):
                coupled_unit = CoupledUnit(
                    unit,
                    block,
                    branch=block.run_branch,
                    activate=before.activate if isinstance(before, Behind | Merge) else before,
                    coupling=self.g,
                    starts=run_index == 0,
                    anchor=every > 0 and run_index > 0 and run_index % every == 0,
                    streams=self.streams,
                )
                units.append(coupled_unit)
                before = Merge(LastActivation(block), coupled_unit.activate, self.g, self.streams)
            elif is_coupled(block):
                units.append(Opening(block, before, self.streams).unit(unit))
                before = Behind(LastActivation(block), self.streams)
            else:
                units.append(FunctionUnit(unit, Foreign(block, before, self.streams), {"block": block}, self.streams))
                before = Behind(unchanged, self.streams)
        return units, Leaving(self, before, self.streams)


def _idempotent(activate: Callable[[Tensor], Tensor]) -> bool:
    """act(act(x)) = act(x): only then can a run start from the activation that the stem hands on."""
    once = activate(torch.linspace(-9.0, 9.0, 181, device="cpu"))
    return torch.equal(activate(once), once)
