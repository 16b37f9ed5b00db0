"""Layers of timm's ResNet with a coupling: the part of a reversible ResNet that is reversible."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple, Optional, Self, overload

import torch
from torch import Tensor, nn

from petra_zoo.errors import UserError
from petra_zoo.models.coupled_block import CoupledBlock, couple_block, is_coupled, is_zero
from petra_zoo.models.layer_parts import Enter, Foreign, Leaving, Merge, Opening, first_stream
from petra_zoo.models.memory_modes import Memory, saves_memory
from petra_zoo.reversible import (
    COUPLING_STEPS,
    CoupledUnit,
    Coupling,
    FunctionUnit,
    StreamKind,
    StreamType,
    Unit,
    backpropagate,
    merge,
    nearest_coupling,
    readable,
)
from petra_zoo.reversible.reading import BufferReading
from petra_zoo.reversible.stream_type import check_kind, scripted_kind, to_carrier, to_grid


class Position(NamedTuple):
    """A block's part in its layer."""

    name: str
    block: nn.Module
    in_run: bool  # has an inverse where g > 0; a coupled block that is not in a run opens the layer
    run_index: int  # 0: starts its run


class CoupledLayer(nn.Sequential):
    """A ResNet layer whose blocks, behind the down-sampling one, form a run of coupled blocks.

    Takes and gives activations [B, C, H, W], like timm's layers: the run starts and ends inside. In train mode it
    stores no activations inside the run (see `memory`). The coupling is a buffer, in the state dict as ``coupling``;
    a state dict without one is a plain ResNet's and sets it to 0. Blocks may be removed, replaced, appended and sliced
    like those of timm's layers: what is no coupled block (`couple_block` makes one) counts as a unit without an
    inverse, and ends the run before it.

    Args:
        blocks: timm BasicBlocks or Bottlenecks; they are turned into their coupled form in place.
        behind_stem: the layer's input is the stem's output, so that its first block may start the run.
        coupling: g, a multiple of 1/256 in [0, 1]; None: 1, and whatever a checkpoint says.
        anchor_every: keep the streams every so many blocks of the run; 0: never.
        grid: > 0 makes the inversion exact at g = 1 (see `petra_zoo.reversible.StreamType`).
        streams: what carries the streams (likewise).
    """

    if TYPE_CHECKING:
        coupling: Tensor

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
        super().__init__(*(couple_block(block) for block in blocks))
        # Whether block 0 is in the run (TorchScript: an attribute).
        first = self[0]
        self.starts = behind_stem and first.downsample is None and _idempotent(first.activate)
        self.anchor_every = anchor_every
        self.grid = grid
        self.memory: Memory = "reversible"
        self.kind: str  # TorchScript knows no literals
        self.set_streams(streams)
        self.asked_for = coupling
        g = check_coupling(1.0 if coupling is None else coupling)
        self._g = BufferReading(g, nearest_coupling)
        weight = next(self.parameters())
        self.register_buffer("coupling", torch.full((), g, device=weight.device, dtype=weight.dtype))

    @torch.jit.unused
    def streams(self) -> StreamType:
        """The type of the layer's streams: what `auto` stands for now is decided."""
        return StreamType(self.grid, check_kind(self.kind)).now(lambda: self._g.latest(self.coupling), self)

    @torch.jit.unused
    def set_streams(self, kind: StreamKind) -> None:
        """Chooses what carries the streams.

        Raises:
            UserError: no such kind, or one without a place for the grid of exact inversion.
        """
        if check_kind(kind) == "bfloat16" and self.grid > 0.0:
            raise UserError("exact=True rounds float32 streams to a grid: leave streams out, or use exact=False")
        self.kind = kind

    # -- the coupling ---------------------------------------------------------------------------------------------

    @torch.jit.unused
    def g(self) -> float:
        """The coupling as a number, read back from the buffer; on a GPU, only when its version tells that it changed.

        Writes through ``buffer.data`` change no version: a GPU's are seen after the next other write.

        Raises:
            ValueError: the buffer's value is not between 0 and 1.
        """
        return self._g.now(self.coupling)

    @torch.jit.unused
    def _coupling_now(self) -> Coupling:
        """g as a number where it can be read, else as a tensor.

        A compiled, traced or exported network reads the buffer each time it runs; torch.func's transforms put tensors
        in the buffer's place that have no single value.
        """
        buffer = self.coupling
        if readable(buffer) or buffer.is_meta:
            return self.g()
        g = buffer.to(torch.promote_types(buffer.dtype, torch.float32))
        return torch.round(g * COUPLING_STEPS) / COUPLING_STEPS

    @torch.jit.unused
    def set_coupling(self, g: float) -> None:
        """Sets g, a multiple of 1/256 in [0, 1]."""
        with torch.no_grad():
            self.coupling.fill_(check_coupling(g))
        self._g.value = g

    @torch.jit.unused
    def reset_coupling(self) -> None:
        """Sets g as a newly built layer has it."""
        self.set_coupling(1.0 if self.asked_for is None else self.asked_for)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.g()  # on the meta device it could not be read any more
        return super()._apply(fn, recurse)

    if TYPE_CHECKING:

        @overload
        def __getitem__(self, idx: slice) -> CoupledLayer: ...

        @overload
        def __getitem__(self, idx: int) -> CoupledBlock: ...

    def __getitem__(self, idx: int | slice) -> nn.Module:
        """A block, or a slice as a layer that shares blocks and coupling with this one."""
        if not isinstance(idx, slice):
            return super().__getitem__(idx)
        return self.with_blocks(dict(list(self._modules.items())[idx]))

    @torch.jit.unused
    def __add__(self, other: nn.Sequential) -> CoupledLayer:
        """A layer of these blocks and the others behind them, with this layer's coupling."""
        if not isinstance(other, nn.Sequential):
            raise ValueError(f"only a Sequential can be added to a layer, not {type(other).__name__}")
        if isinstance(other, CoupledLayer) and other.g() != self.g():
            raise ValueError(f"layers with couplings {self.g():g} and {other.g():g} cannot become one")
        return self.with_blocks({str(i): block for i, block in enumerate([*self, *other])})

    @torch.jit.unused
    def __mul__(self, times: int) -> CoupledLayer:
        """A layer of these blocks so many times over, with this layer's coupling."""
        if not isinstance(times, int) or times < 1:
            raise ValueError(f"a layer can be multiplied by 1, 2, ..., not by {times!r}")
        return self.with_blocks({str(i): block for i, block in enumerate([*self] * times)})

    @torch.jit.unused
    def with_blocks(self, blocks: Mapping[str, nn.Module]) -> CoupledLayer:
        """A layer of other blocks that shares this one's coupling."""
        other = copy.copy(self)  # shares the dict of buffers: its coupling stays this layer's
        other._modules = dict(blocks)
        other.starts = self.starts and len(other) > 0 and other[0] is self[0]
        return other

    # -- forward --------------------------------------------------------------------------------------------------

    def forward(self, h: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            g: Coupling = float(torch.round(self.coupling.float() * 256.0)) / 256.0
        else:
            if saves_memory(self, h):
                return self._forward_units(h)
            g = self._coupling_now()
        return self._forward_plainly(h, g)

    def _forward_plainly(self, h: Tensor, g: Coupling) -> Tensor:
        """The blocks one after the other, as ordinary operations; the one copy of the loop that TorchScript has."""
        dtype = h.dtype
        kind = "float32"
        if torch.jit.is_scripting():  # it knows no `StreamType`
            kind = scripted_kind(self.kind, float(g), self.grid, dtype)
            b = to_carrier(h, kind)
            if self.grid > 0.0 and self.starts:
                b = to_grid(b, self.grid)
        else:
            streams = self.streams()
            b = self.enter(h)
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
                    out = block.scripted(h, a, g, kind, self.grid)
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
                    b = to_carrier(block(h.to(dtype)), kind)
                else:
                    b = streams.carry(block(streams.for_branch(h, block)))
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
    def enter(self, h: Tensor) -> Tensor:
        """The stream b that an activation becomes in front of the layer."""
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
        before: Enter = enter  # from the streams in front of a block to its h
        for key, block, in_run, run_index in self.positions():
            unit = f"{name}.{key}"
            if in_run and is_coupled(block):
                coupled_unit = CoupledUnit(
                    unit,
                    block,
                    branch=block.run_branch,
                    activate=before.behind if isinstance(before, Merge) and run_index > 0 else before,
                    coupling=self.g,
                    starts=run_index == 0,
                    anchor=self.anchor_every > 0 and run_index > 0 and run_index % self.anchor_every == 0,
                    streams=self.streams,
                )
                units.append(coupled_unit)
                before = Merge(block.activate, coupled_unit.activate, self.g)
            elif is_coupled(block):
                units.append(Opening(block, before, self.streams).unit(unit))
                before = block.activate
            else:
                units.append(FunctionUnit(unit, Foreign(block, before, self.streams), {"block": block}))
                before = first_stream
        return units, Leaving(self, before, self.streams)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Tensor],
        prefix: str,
        local_metadata: Mapping[str, int],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key = prefix + "coupling"
        if key not in state_dict and self._is_in(state_dict, prefix):
            # A plain ResNet's layer: the ResNet's function. On the weights' device: with assign=True it stays there.
            like = next(value for name, value in state_dict.items() if name.startswith(prefix))
            state_dict[key] = torch.zeros((), device=like.device, dtype=self.coupling.dtype)
        g = None
        if key in state_dict and not state_dict[key].is_meta:
            try:  # an average of state dicts: off by a rounding error, or between two couplings
                g = nearest_coupling(float(state_dict[key]))
            except ValueError as error:
                error_msgs.append(f"{key}: {error}")
                return
            state_dict[key] = torch.full_like(state_dict[key], g)
        if self.asked_for is not None and g is not None and g != self.asked_for:
            error_msgs.append(
                f"{key} is {g:g} in the checkpoint (0: a plain ResNet), but the model was built "
                f"with coupling={self.asked_for:g}: leave coupling out, or convert the checkpoint"
            )
            return
        if g is not None:
            self._g.value = g
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    @torch.jit.unused
    def _is_in(self, state_dict: dict[str, Tensor], prefix: str) -> bool:
        """Whether a state dict holds most of the layer's weights, and of its buffers too where there are some.

        One that holds parameters alone, or a few of them, says nothing of the coupling.
        """
        parameters = [prefix + name in state_dict for name, _ in self.named_parameters()]
        buffers = [prefix + name in state_dict for name, _ in self.named_buffers() if name != "coupling"]
        return any(parameters) and all(2 * sum(found) >= len(found) for found in (parameters, buffers))


def check_coupling(g: float) -> float:
    """Returns g.

    Raises:
        UserError: g is not a multiple of 1/256 in [0, 1].
    """
    if not (0.0 <= g <= 1.0 and g * COUPLING_STEPS == int(g * COUPLING_STEPS)):
        raise UserError(f"a coupling is a multiple of 1/256 between 0 and 1, not {g!r}")
    return float(g)


def _idempotent(activate: Callable[[Tensor], Tensor]) -> bool:
    """act(act(x)) = act(x): only then can a run start from the activation that the stem hands on."""
    once = activate(torch.linspace(-9.0, 9.0, 181, device="cpu"))
    return torch.equal(activate(once), once)
