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

Seeding = Callable[[int, int, int], None]  # of (seed, unit, micro-batch)
_seedings: list[Seeding] = []


def seed_generators(seed: int, unit: int, micro_batch: int, device: torch.device) -> None:
    """Seeds the global generators of the CPU and of `device` for one evaluation of one unit."""
    if _seedings:
        _seedings[-1](seed, unit, micro_batch)
        return
    set_generators(seed_of(seed, unit, micro_batch), device)


def set_generators(number: int, device: torch.device) -> None:
    """Seeds the global generators of the CPU and of `device`."""
    torch.default_generator.manual_seed(number)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(number)


def seed_of(seed: int, unit: int, micro_batch: int) -> int:
    """The number that generators are seeded with: the CPU's uses 32 bits."""
    digest = blake2b(struct.pack("<qqq", seed, unit, micro_batch), digest_size=4).digest()
    return int.from_bytes(digest, "little")


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
