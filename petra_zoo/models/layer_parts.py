"""What the units of a layer call: from the streams in front of a block to its activation, and on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from petra_zoo.models.coupled_block import CoupledBlock
from petra_zoo.reversible import ForkedUnit, FunctionUnit, Streams, StreamType, Unit, merge_streams
from petra_zoo.reversible.stream_type import rectifies

Enter = Callable[..., Tensor]  # what a unit makes of the streams it gets: the activation h [B, C, H, W]


def first_stream(*streams: Tensor) -> Tensor:
    return streams[0]


def unchanged(b: Tensor) -> Tensor:
    return b


@dataclass(frozen=True)
class Opening:
    """A down-sampling block, and any other coupled block that is not in a run: its output is the stream b."""

    block: CoupledBlock
    enter: Enter
    kind: Callable[[], StreamType]

    def __call__(self, *streams: Tensor) -> Streams:
        return (self.block.coupled_step(self.enter(*streams), streams=self.kind()),)

    def unit(self, name: str) -> Unit:
        """The block as a unit."""
        modules: dict[str, nn.Module] = {"block": self.block}
        if getattr(type(self.block), "coupled_step", None) is not CoupledBlock.coupled_step:
            return FunctionUnit(name, self, modules, self.kind)  # somebody's own sum
        return ForkedUnit(name, self, modules, self.enter, (self._shortcut, self._branch), self.kind)

    def _shortcut(self, h: Tensor) -> Tensor:
        project, kind = self.block.downsample, self.kind()
        if project is None:
            return kind.shortcut(h, self.block)
        return kind.carry(project(kind.for_branch(h, self.block)))

    def _branch(self, h: Tensor) -> Tensor:
        return self.block.run_branch(self.kind().for_branch(h, self.block))


@dataclass(frozen=True)
class Foreign:
    """A module that knows no streams: it takes and gives activations."""

    block: nn.Module
    enter: Enter
    kind: Callable[[], StreamType]

    def __call__(self, *streams: Tensor) -> Streams:
        h = self.enter(*streams)
        h = h.clone() if h is streams[0] else h  # it may write into its argument, not into a stream
        kind = self.kind()
        return (kind.enter(self.block(kind.for_branch(h, self.block))),)


@dataclass(frozen=True)
class Behind:
    """Behind a block without an inverse, or a module that knows no streams: from its stream b to the activation h.

    Attributes:
        activate: the activation behind it.
        kind: reads the type of its stream.
    """

    activate: Callable[[Tensor], Tensor]
    kind: Callable[[], StreamType]

    def __call__(self, *streams: Tensor) -> Tensor:
        return self.kind().activated(streams[0], self.activate)


@dataclass(frozen=True)
class LastActivation:
    """The activation behind a block, found when it is called: the block may have been given another one."""

    block: CoupledBlock

    def __call__(self, b: Tensor) -> Tensor:
        return self.block.activate(b)

    @property
    def rectifies(self) -> bool:
        """Whether it is relu and nothing else."""
        return isinstance(self.block, CoupledBlock) and self.block.rectifies()  # of a wrapper nobody knows


@dataclass(frozen=True)
class Merge:
    """The end of a run: from the streams behind a block of it to the activation h.

    Attributes:
        activate: the activation behind the block.
        in_front: the one in front of it, which made h of the stream that is now a.
        coupling: reads g.
        kind: reads the streams' type.
    """

    activate: LastActivation
    in_front: Callable[[Tensor], Tensor]
    coupling: Callable[[], float]
    kind: Callable[[], StreamType]

    def __call__(self, *streams: Tensor) -> Tensor:
        kind = self.kind()
        if len(streams) == 1:
            return kind.activated(streams[0], self.activate)
        (b, a), g = streams, self.coupling()
        if g == 1.0 and rectifies(self.activate) and rectifies(self.in_front):
            return kind.mean_rectified(b, a, self.activate.block)
        return merge_streams(kind.activated(b, self.activate), kind.activated(a, self.in_front), g)


@dataclass(frozen=True)
class PlainMerge:
    """The end of a run without activations: from a unit's streams to the one that they become, (b + g a) / (1 + g)."""

    coupling: Callable[[], float]
    kind: Callable[[], StreamType]

    def __call__(self, *streams: Tensor) -> Tensor:
        h, *before = map(self.kind().read, streams)
        return merge_streams(h, before[0], self.coupling()) if before else h


@dataclass(frozen=True)
class InFront:
    """The first unit of a layer: from what the layer before hands on to the activation h, as this layer carries it."""

    enter: Enter
    kind: Callable[[], StreamType]

    def __call__(self, *streams: Tensor) -> Tensor:
        return self.kind().carry(self.enter(*streams))


@dataclass(frozen=True)
class Leaving:
    """The end of a layer: from its last block's streams to the activation that the layer hands on."""

    layer: nn.Module
    enter: Enter
    kind: Callable[[], StreamType]

    def __call__(self, *streams: Tensor) -> Tensor:
        return self.kind().leave(self.enter(*streams), self.layer)
