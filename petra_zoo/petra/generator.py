"""Random numbers that do not depend on which process draws them, or when.

Dropout and stochastic depth in a unit must draw the same numbers in a micro-batch's forward and in its recomputation
several ticks later, and in one process as in many: the generators are seeded from (seed, unit, micro-batch) before
every evaluation of a unit.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b

import torch


def seed_generators(seed: int, unit: int, micro_batch: int, device: torch.device) -> None:
    """Seeds the global generators of the CPU and of `device` for one evaluation of one unit."""
    digest = blake2b(struct.pack("<qqq", seed, unit, micro_batch), digest_size=4).digest()
    number = int.from_bytes(digest, "little")  # the CPU's generator uses 32 bits of a seed
    torch.default_generator.manual_seed(number)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(number)


@contextmanager
def own_generators(device: torch.device) -> Iterator[None]:
    """Inside, the global generators may be seeded; outside they are as they were."""
    with torch.random.fork_rng([device] if device.type == "cuda" else [], device_type="cuda"):
        yield
