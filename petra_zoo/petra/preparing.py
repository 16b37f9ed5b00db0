"""What is done to images in front of the network's first unit: where they are needed, not where they come from.

So what travels and waits for a backward is what was fed: bytes, and the numbers by which they are to be mixed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from petra_zoo.reversible import Streams, Unit
from petra_zoo.reversible.saturation import Saturation

Prepare = Callable[..., Tensor]  # what was fed -> the images that the first unit takes
Images = Tensor | Streams  # as they are fed: images, or these and what else a `Prepare` takes


class PreparedUnit(Unit):
    """A first unit with what is done to images in front of it, in its forward and in its recomputation.

    It has no inverse, whatever the unit itself has: what was fed is kept, and it is the smaller.

    Args:
        unit: the model's first one.
        prepare: a function without parameters that draws nothing and leaves its arguments as they are.
    """

    def __init__(self, unit: Unit, prepare: Prepare) -> None:
        super().__init__(unit.name)
        self.unit = unit
        self.prepare = prepare
        self.outside = unit.outside

    def forward(self, *streams: Tensor) -> Streams:
        return self.unit(self.prepare(*streams))

    def values(self, streams: Streams) -> Streams:
        return self.unit.values(streams)

    def saturation(self) -> Saturation | None:
        return self.unit.saturation()


def prepared_units(units: Sequence[Unit], prepare: Prepare | None) -> list[Unit]:
    """A model's units, the first of them with what is done to images in front of it."""
    return list(units) if prepare is None else [PreparedUnit(units[0], prepare), *units[1:]]


def fed_streams(images: Images) -> Streams:
    """What was fed as the streams that enter the first unit."""
    return (images,) if isinstance(images, Tensor) else tuple(images)
