"""Where rings write and read, on the device, for ticks that are replayed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from petra_zoo.petra.fifo import Ring


class RingPlaces:
    """The slots of rings as numbers on the device, which move on by themselves in every captured tick.

    Args:
        rings: every one of which is written and read once per tick.
        device: where they are.
    """

    def __init__(self, rings: Sequence[Ring], device: torch.device) -> None:
        self.rings = rings
        slots = [ring.slots for ring in rings for _ in range(2)]
        self._slots = torch.tensor(slots, dtype=torch.int64, device=device)
        self._places = torch.empty_like(self._slots)

    def set(self) -> None:
        """Sets them to where the rings are on the host."""
        places = [place for ring in self.rings for place in (ring.inlet, ring.outlet)]
        self._places.copy_(torch.tensor(places, dtype=torch.int64))

    @contextmanager
    def used(self) -> Iterator[None]:
        """Inside, the rings go by them; then all move on."""
        for n, ring in enumerate(self.rings):
            ring.places = (self._places[2 * n : 2 * n + 1], self._places[2 * n + 1 : 2 * n + 2])
        try:
            yield
            self._places.add_(1).remainder_(self._slots)
        finally:
            for ring in self.rings:
                ring.places = None
