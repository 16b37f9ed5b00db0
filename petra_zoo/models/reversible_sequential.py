"""Any chain of blocks that keep their shape, reversible: the container that saves memory for whoever calls it.

A block B is a branch F = B - id, whatever is inside of it, and what runs through the chain needs no activation between
two blocks (act = id). So a run of blocks is the one formula without looking into any of them,

    b' = s B(h) + (1 - g - s) h + g a        a' = b = h

with the coupling g and the gain s. Its first block takes one stream and is the block itself, and at g = 0 all are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from petra_zoo.errors import UserError
from petra_zoo.models.branches import Branch, branches_of, parted_branch
from petra_zoo.models.layer_parts import Enter, Leaving, PlainMerge, first_stream, unchanged
from petra_zoo.models.memory_modes import Memory, saves_memory
from petra_zoo.models.run_buffers import RunBuffers
from petra_zoo.models.shared_arguments import Arguments, Given, Named, Positional, SharedArguments, called
from petra_zoo.models.steps import Step
from petra_zoo.reversible import (
    CallsBranches,
    CoupledUnit,
    Coupling,
    FunctionUnit,
    StreamKind,
    Streams,
    StreamType,
    Unit,
    backpropagate,
    coupled,
    merge,
)
from petra_zoo.reversible.parts import PartedBranch, check_chunks
from petra_zoo.reversible.plain_path import carries_hook

Units = Literal["auto", "block", "branch"]


class ReversibleSequential(CallsBranches, RunBuffers):
    """Blocks [B, ...] -> [B, ...] one after the other, whose training stores no activations between them.

    What nn.Sequential(blocks) is, with a coupling: at coupling 0 it computes the same to the bit. A call gives every
    block what it is given beside x, ``blocks(x, mask, rope=(sin, cos))``; tensors among it that require gradients get
    them. The coupling and the gain are buffers, in the state dict as ``coupling`` and ``gain``; a state dict without
    them is a plain network's: coupling 0, gain 1. Parameters keep their names. Blocks may be removed, replaced,
    appended and sliced; slices share the coupling.

    TorchScript has no place for what the blocks take beside x: trace or export a network with this container.

    Args:
        blocks: modules, with their names or without.
        coupling: g, a multiple of 1/256 in [0, 1]; None: 1, and whatever a checkpoint says.
        gain: s; None: 1, and whatever a checkpoint says. 1 + g keeps the effect of branches trained at g = 0.
        anchor_every: keep the streams every so many blocks of a run; 0: never.
        exact: reconstruct to the bit, by rounding steps to multiples of 2**-exact_bits.
        exact_bits: the grid of `exact`; streams must stay below 2**(24 - exact_bits) in float32.
        streams: what carries them (see `petra_zoo.reversible.StreamType`).
        units: ``'block'``, also ``'auto'``: a unit is a block; half the inversions. ``'branch'``: it is a branch of one
            (`register_branches`), attention and MLP in turn; a lower peak.
        chunks: in how many parts each such branch is evaluated, where nothing is taken beside x.
        opening: those of the blocks that change their input's shape: each ends the run before it, and has no inverse.

    Raises:
        UserError: a coupling out of range; exact streams in 16 bits; branches of a block not registered, or chunks.
    """

    def __init__(
        self,
        blocks: Iterable[nn.Module] | Mapping[str, nn.Module],
        *,
        coupling: float | None = None,
        gain: float | None = None,
        anchor_every: int = 0,
        exact: bool = False,
        exact_bits: int = 12,
        streams: StreamKind = "auto",
        units: Units = "auto",
        chunks: int = 1,
        opening: Iterable[nn.Module] = (),
    ) -> None:
        if isinstance(blocks, nn.Sequential | nn.ModuleList):
            blocks = blocks._modules
        named = blocks if isinstance(blocks, Mapping) else {str(i): block for i, block in enumerate(blocks)}
        grid = 2.0**-exact_bits if exact else 0.0
        super().__init__(list(named.values()), coupling, grid, streams, gain=gain, has_gain=True)
        self._modules = dict(named)
        self.anchor_every = anchor_every
        self.memory: Memory = "reversible"
        self.unit_kind = units
        self.chunks = check_chunks(chunks)
        if chunks > 1 and units != "branch":
            raise UserError(f"chunks={chunks} are of branches: use units='branch'")
        self.opening = self._named(list(opening))
        self.steps()  # an unknown block is refused at once

    # -- forward --------------------------------------------------------------------------------------------------

    @torch.jit.unused
    def forward(self, input: Tensor, *shared: Given, **named: Given) -> Tensor:
        """The blocks' output.

        Args:
            input: x, [B, ...].
            shared: what every block takes behind x.
            named: what it takes by keyword.
        """
        return self.features(input, (), *shared, **named)[0]

    @torch.jit.unused
    def features(self, x: Tensor, indices: Iterable[int], *shared: Given, **named: Given) -> list[Tensor]:
        """Outputs [B, ...] on the way: the merged streams behind some of the blocks, and the last one's output.

        Args:
            x: [B, ...].
            indices: places of blocks, from 0; the outputs come in the order of the blocks.
            shared, named: as in `forward`.
        """
        if saves_memory(self, x):
            return self._by_units(x, set(indices), SharedArguments(shared, named))
        return self._plainly(x, set(indices), shared, named)

    @torch.jit.unused
    def arguments(self, name: str, shared: Positional, named: Named) -> tuple[Positional, Named]:
        """What the block of a name takes of what all are given: all of it, unless a subclass says something else."""
        return shared, named

    @torch.jit.unused
    def _plainly(self, x: Tensor, indices: set[int], shared: Positional, named: Named) -> list[Tensor]:
        """As ordinary operations."""
        g, gain, streams = self._coupling_now(), self._gain_or_tensor(), self.streams().as_floats()
        found: list[Tensor] = []
        h, a = streams.enter(x), None
        for step in self.steps():
            self._check_hooks(step)
            if not step.in_run and a is not None:
                h, a = merge(h, a, g), None
            given, by_name = self.arguments(step.key, shared, named)
            parted, taken = self._parted(step, given, by_name), streams.for_branch(h, step.block)
            f = step(taken, *given, **by_name) if parted is None else parted(taken)
            if step.in_run:
                b = coupled(h, f, None if step.starts else a, g, streams, gain, step.whole)
                h, a = b, None if _is_zero(g) else h
            else:
                h = streams.enter(f)
            if step.ends and step.index in indices:
                found.append(streams.leave(h if a is None else merge(h, a, g), self))
        return [*found, streams.leave(h if a is None else merge(h, a, g), self)]

    @torch.jit.unused
    def _by_units(self, x: Tensor, indices: set[int], arguments: SharedArguments) -> list[Tensor]:
        """Through the units, from one output that is asked for to the next; each stretch stores its end."""
        streams: Streams = (self.enter(x),)
        found: list[Tensor] = []
        stretch: list[Unit] = []
        leave: Enter = first_stream
        for step, unit, leave in self._units(first_stream, arguments, {}):
            unit.outside = (self, arguments)
            stretch.append(unit)
            if step.ends and step.index in indices:
                streams = self._run(stretch, streams)
                found.append(leave(*streams))
                stretch = []
        end = FunctionUnit("merge", lambda *streams: (leave(*streams),), {})
        end.outside = (self, arguments)
        return [*found, self._run([*stretch, end], streams)[0]]

    def _run(self, units: list[Unit], streams: Streams) -> Streams:
        return backpropagate(units, streams, reconstruct=self.memory == "reversible")

    @torch.jit.unused
    def _parted(self, step: Step, shared: Positional, named: Named) -> PartedBranch | None:
        """A step in parts, which know of nothing that is taken beside x; None: it stays whole."""
        if self.chunks == 1 or any(x is not None and x is not False for x in (*shared, *named.values())):
            return None
        return parted_branch(step.block, step.name.rpartition(".")[2], self.chunks)

    def _check_hooks(self, step: Step) -> None:
        if not step.whole and carries_hook(step.block):
            raise UserError(
                f"block {step.key} has a hook, but is not called as a whole where units='branch': "
                "put the hook on a module inside of it, ask features() for its output, or use units='block'"
            )

    # -- streams --------------------------------------------------------------------------------------------------

    @torch.jit.unused
    def streams(self) -> StreamType:
        """The type of the streams; at coupling 0 they are what the blocks give, in whatever type."""
        if self.kind == "auto" and self._g.latest(self.coupling) == 0.0:
            return _AsGiven()
        return super().streams()

    @torch.jit.unused
    def enter(self, h: Tensor) -> Tensor:
        """The stream b that an activation [B, ...] becomes in front of the first unit."""
        return self.streams().enter(h)

    # -- units ----------------------------------------------------------------------------------------------------

    @torch.jit.unused
    def steps(self) -> list[Step]:
        """The blocks, or their branches, as the container stands now.

        Raises:
            UserError: `units='branch'` of a block whose class is not registered.
        """
        steps: list[Step] = []
        in_front = -1  # blocks of this run in front of the block
        for index, (key, block) in enumerate(self._modules.items()):
            opens = key in self.opening
            in_front = -1 if opens else in_front + 1
            whole = opens or self.unit_kind != "branch"
            parts: Sequence[tuple[str, Branch]] = [("", block)] if whole else branches_of(block)
            for i, (part, function) in enumerate(parts):
                name = f"{key}.{part}".rstrip(".")
                steps.append(Step(name, key, block, function, whole, index, in_front, i, len(parts)))
        return steps

    @torch.jit.unused
    def blocks_to_compile(self) -> list[nn.Module]:
        """All."""
        return list(self.children())

    @torch.jit.unused
    def in_run(self) -> list[int]:
        """Indices of the blocks that have an inverse where g > 0."""
        return sorted({step.index for step in self.steps() if step.in_run})

    @torch.jit.unused
    def units(
        self,
        name: str,
        enter: Enter = first_stream,
        shared: Positional | Callable[[], Positional] = (),
        reads: Mapping[str, nn.Module] | None = None,
        named: Named | None = None,
    ) -> tuple[list[Unit], Enter]:
        """The blocks as units, for a model's own `units()`.

        Args:
            name: the container's name in its model.
            enter: what the first unit applies to the streams it gets. It takes one, of the container's type (`enter`).
            shared: what every block takes behind its stream, without gradients; or what computes it, called in every
                unit.
            reads: modules of which `shared` reads parameters, by their names.
            named: what every block takes by keyword, where `shared` is no function.

        Returns:
            The units, and what turns the last one's streams into the output [B, ...].
        """
        arguments: Arguments = called(shared) if callable(shared) else SharedArguments(shared, named or {})
        units: list[Unit] = []
        leave: Enter = Leaving(self, enter, self.streams)
        if enter is not first_stream:
            entering = enter = _Entering(self, enter)
            if any(step.in_run for step in self.steps()[:1]):  # it takes a stream as it is
                units.append(FunctionUnit(f"{name}.enter", lambda *streams: (entering(*streams),), {}, self.streams))
                enter = first_stream
        for step, unit, behind in self._units(enter, arguments, reads or {}):
            leave = behind
            unit.name = f"{name}.{step.name}"
            units.append(unit)
        return units, leave

    def _units(
        self, enter: Enter, arguments: Arguments, reads: Mapping[str, nn.Module]
    ) -> Iterator[tuple[Step, Unit, Enter]]:
        """Each step with its unit, and with what turns the streams behind it into the output."""
        for step in self.steps():
            parted = self._parted(step, *arguments()) if self.chunks > 1 else None
            function = parted or _Function(self, step, arguments)
            if step.in_run:
                unit: Unit = CoupledUnit(
                    step.name,
                    step.holder,
                    branch=function,
                    activate=unchanged,
                    coupling=self.g,
                    starts=step.starts,
                    anchor=step.is_anchor(self.spacing(step.parts)),
                    streams=self.streams,
                    gain=self.gain_now,
                    whole=step.whole,
                )
            else:
                unit = FunctionUnit(step.name, _Opening(function, step.block, enter, self.streams), {})
                unit.add_module("block", step.block)
            for name, module in reads.items():
                unit.add_module(f"reads_{name.replace('.', '_')}", module)
            enter = PlainMerge(self.g, self.streams)
            yield step, unit, Leaving(self, enter, self.streams)


@dataclass(frozen=True)
class _Function:
    """A step as a function of h alone."""

    container: ReversibleSequential
    step: Step
    given: Arguments

    def __call__(self, h: Tensor) -> Tensor:
        shared, named = self.container.arguments(self.step.key, *self.given())
        return self.step(h, *shared, **named)


@dataclass(frozen=True)
class _Opening:
    """A block that changes the shape: from the streams in front of it to the stream b behind it."""

    function: Callable[[Tensor], Tensor]
    block: nn.Module
    enter: Enter
    kind: Callable[[], StreamType]

    def __call__(self, *streams: Tensor) -> Streams:
        kind = self.kind()
        return (kind.enter(self.function(kind.for_branch(self.enter(*streams), self.block))),)


@dataclass(frozen=True)
class _Entering:
    """In front of a container: from the streams there to its first stream."""

    container: ReversibleSequential
    enter: Enter

    def __call__(self, *streams: Tensor) -> Tensor:
        return self.container.enter(self.enter(*streams))


class _AsGiven(StreamType):
    """Streams without an inverse, which need no type of their own."""

    def carry(self, x: Tensor) -> Tensor:
        return x

    def for_branch(self, h: Tensor, module: nn.Module) -> Tensor:
        return h


def _is_zero(g: Coupling) -> bool:
    return not isinstance(g, Tensor) and g == 0.0
