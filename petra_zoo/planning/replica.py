"""One pipeline of a prediction, cut into stages, and how much it has to do for an update."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from petra_zoo.petra.unit_profile import UnitProfile


@dataclass(frozen=True)
class PlannedStage:
    """A stage on a device of its own.

    Attributes:
        units: its units' profiles.
        index: from 0.
        last: whether it is the last one.
    """

    units: tuple[UnitProfile, ...]
    index: int
    last: bool

    @property
    def parameters(self) -> int:
        """Bytes of its parameters."""
        return sum(unit.parameter_bytes for unit in self.units)

    @property
    def received(self) -> int:
        """Bytes of streams that come up per micro-batch; the first stage's images are not counted."""
        return 0 if self.index == 0 else self.units[0].input_bytes

    @property
    def sent(self) -> int:
        """Bytes of streams that go up."""
        return 0 if self.last else self.units[-1].output_bytes


@dataclass(frozen=True)
class Replica:
    """One of D equal pipelines.

    Attributes:
        parts: the units of each stage.
        micro_batches: per update, of this replica: m of a synchronous schedule, k of an asynchronous one.
        replicas: D.
        scale: size of a micro-batch over the profile's; replicas that do not divide an update have smaller ones.
    """

    parts: tuple[tuple[UnitProfile, ...], ...]
    micro_batches: int
    replicas: int
    scale: float

    @cached_property
    def stages(self) -> tuple[PlannedStage, ...]:
        """The stages, first to last."""
        last = len(self.parts) - 1
        return tuple(PlannedStage(part, j, j == last) for j, part in enumerate(self.parts))
