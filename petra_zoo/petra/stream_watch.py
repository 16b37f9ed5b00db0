"""What is in flight stays what it is: a change of the streams' type, their grid or a coupling waits for a drain.

A message says neither which bits its streams are nor with which coupling they were computed. A stage would read them
as its streams are now: numbers as steps of a grid, steps of one grid as those of another, or invert with a coupling
that no forward has had.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from petra_zoo.errors import UserError
from petra_zoo.reversible import CoupledUnit, FunctionUnit, StreamType, Unit

_Reader = Callable[[], StreamType] | Callable[[], float]


class StreamWatch:
    """Looks, before each tick, at what carries the streams of some units.

    Args:
        units: those of this process. Each of what their runs share is read once.
    """

    def __init__(self, units: Sequence[Unit]) -> None:
        self._readers: dict[_Reader, str] = {}  # and the first unit that has it
        coupled = [unit for unit in units if isinstance(unit, CoupledUnit)]
        for unit in coupled:  # a coupling first, since a type may go by it
            self._readers.setdefault(unit.coupling, unit.name)
        for typed in [*coupled, *(unit for unit in units if isinstance(unit, FunctionUnit))]:
            if callable(typed.streams):
                self._readers.setdefault(typed.streams, typed.name)
        self._seen: list[StreamType | float] = []

    def look(self, in_flight: int) -> None:
        """Takes note of how everything is.

        Args:
            in_flight: how many micro-batches are.

        Raises:
            UserError: there are some, and something is not as it was at the last look.
        """
        now = [read() for read in self._readers]
        if in_flight and now != self._seen:
            for name, was, is_now in zip(self._readers.values(), self._seen, now, strict=True):
                if was != is_now:
                    raise UserError(
                        f"{name} went from {_words(was)} to {_words(is_now)} while micro-batches are in flight "
                        f"({in_flight}): set it back, drain() the pipeline, and change it then"
                    )
        self._seen = now

    def require_float32(self) -> None:
        """Refuses 16 bits, where gradients of float16 are to be scaled in the streams.

        Raises:
            UserError: names the first unit that has them.
        """
        for read, name in self._readers.items():
            if isinstance(x := read(), StreamType) and x.kind != "float32":
                raise UserError(
                    f"{name} has {_words(x)}: with autocast to float16 gradients are scaled in float32 streams; set "
                    "streams=float32, or autocast to bfloat16"
                )

    def kinds(self) -> list[str]:
        """What carries the streams now, in words: for a state to know what its messages are."""
        return [_words(x) for read in self._readers if isinstance(x := read(), StreamType)]


def _words(x: StreamType | float) -> str:
    if not isinstance(x, StreamType):
        return f"coupling {x:g}"
    grid = x.fixed if x.kind == "fixed16" else x.grid
    return f"{x.kind} streams" + (f" in steps of 2^{math.log2(grid):g}" if grid > 0.0 else "")
