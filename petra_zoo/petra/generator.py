"""Random numbers that do not depend on which process draws them, or when.

Dropout and stochastic depth in a unit must draw the same numbers in a micro-batch's forward and in its recomputation
several ticks later, and in one process as in many: the generators are seeded from (seed, unit, micro-batch) before
every evaluation of a unit.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import blake2b

import torch

from petra_zoo.reversible.replay import generator_states

Seeding = Callable[[int, int, int], None]  # of (seed, unit, micro-batch)
Draw = tuple[int, int, int]  # seed, unit, age of the micro-batch: how many have been fed since
_seedings: list[Seeding] = []


def seed_generators(seed: int, unit: int, micro_batch: int, device: torch.device) -> None:
    """Seeds the global generators of the CPU and of `device` for one evaluation of one unit."""
    if _seedings:
        _seedings[-1](seed, unit, micro_batch)
        return
    set_generators(seed_of(seed, unit, micro_batch), device)


def set_generators(number: int, device: torch.device) -> None:
    """Seeds the global generators of the CPU and of `device`."""
    # Always, although most units draw nothing: 3 us. To look whether one has drawn takes longer, and comes too late.
    torch.default_generator.manual_seed(number)
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.default_generators[index].manual_seed(number)


def seed_of(seed: int, unit: int, micro_batch: int) -> int:
    """The number that generators are seeded with: the CPU's uses 32 bits."""
    digest = blake2b(struct.pack("<qqq", seed, unit, micro_batch), digest_size=4).digest()
    return int.from_bytes(digest, "little")


class Draws:
    """Stands in for `seed_generators` in a tick that is watched: it seeds, and notes who then draws.

    Args:
        device: whose generator is seeded beside the CPU's.
        micro_batch: the newest; ages are told from it.

    Attributes:
        found: of every seeding for a unit, in order: what it was for, or None where nothing was drawn then.
    """

    def __init__(self, device: torch.device, micro_batch: int) -> None:
        self.device, self.micro_batch = device, micro_batch
        self.found: list[Draw | None] = []
        self._last: Draw | None = None
        self._seeded = b""

    def __call__(self, seed: int, unit: int, micro_batch: int) -> None:
        self.look()
        set_generators(seed_of(seed, unit, micro_batch), self.device)
        self._seeded = self._states()
        if unit >= 0:  # else it is an optimizer's
            self._last = (seed, unit, self.micro_batch - micro_batch)
            self.found.append(None)

    def look(self) -> None:
        """Notes whether something was drawn since the last seeding; to be called at the end too."""
        if self._last and self._states() != self._seeded:
            self.found[-1] = self._last
        self._last = None

    def _states(self) -> bytes:
        return b"".join(bytes(state.numpy()) for state in generator_states(self.device).values())


@contextmanager
def seeded_by(seeding: Seeding) -> Iterator[None]:
    """Inside, `seed_generators` asks for another way: generators cannot be seeded while a CUDA graph is captured."""
    _seedings.append(seeding)
    try:
        yield
    finally:
        _seedings.pop()


@contextmanager
def own_generators(device: torch.device) -> Iterator[None]:
    """Inside, the global generators may be seeded; outside they are as they were."""
    with torch.random.fork_rng([device] if device.type == "cuda" else [], device_type="cuda"):
        yield
