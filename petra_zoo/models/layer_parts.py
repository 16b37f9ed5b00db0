"""What the units of a layer call: from the streams in front of a block to its activation, and on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from petra_zoo.models.coupled_block import CoupledBlock
from petra_zoo.reversible import ForkedUnit, FunctionUnit, Streams, StreamType, Unit, merge

Enter = Callable[..., Tensor]  # what a unit makes of the streams it gets: the activation h [B, C, H, W]


def first_stream(*streams: Tensor) -> Tensor:
    return streams[0]


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
            return FunctionUnit(name, self, modules)  # somebody's own sum
        return ForkedUnit(name, self, modules, self.enter, (self._shortcut, self._branch))

    def _shortcut(self, h: Tensor) -> Tensor:
        project, kind = self.block.downsample, self.kind()
        return kind.carry(h if project is None else project(kind.for_branch(h, self.block)))

    def _branch(self, h: Tensor) -> Tensor:
        return self.block.branch(self.kind().for_branch(h, self.block))


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
        return (kind.carry(self.block(kind.for_branch(h, self.block))),)


@dataclass(frozen=True)
class Merge:
    """The end of a run: from the streams behind a block of it to the activation h.

    Attributes:
        behind: the activation behind the block.
        in_front: the one in front of it, which made h of the stream that is now a.
        coupling: reads g.
    """

    behind: Callable[[Tensor], Tensor]
    in_front: Enter
    coupling: Callable[[], float]

    def __call__(self, *streams: Tensor) -> Tensor:
        h = self.behind(streams[0])
        return h if len(streams) == 1 else merge(h, self.in_front(streams[1]), self.coupling())


@dataclass(frozen=True)
class Leaving:
    """The end of a layer: from its last block's streams to the activation that the layer hands on."""

    layer: nn.Module
    enter: Enter
    kind: Callable[[], StreamType]

    def __call__(self, *streams: Tensor) -> Tensor:
        return self.kind().leave(self.enter(*streams), self.layer)
