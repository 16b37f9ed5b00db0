"""How many threads a process computes with: operations of a small network are too short to be shared out.

Each operation ends when the last thread has done its part. Where anything else runs on the machine, threads of short
operations mostly wait for each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from petra_zoo.petra.counting import Size, count_operations
from petra_zoo.reversible import UnitModel
from petra_zoo.settings.recipe import Recipe

SMALL = 1e9  # floating-point operations of a micro-batch's forward, below which one thread computes it


def threads_for(recipe: Recipe, model: UnitModel, input_size: Size, device: torch.device) -> int | None:
    """Threads of each process of a run; None: as many as torch has taken.

    Args:
        recipe: may say it.
        model: the network.
        input_size: [C, H, W] of an image.
        device: of the process; on another than the CPU threads do not matter.
    """
    if recipe.threads is not None:
        return recipe.threads
    if device.type != "cpu" or torch.get_num_threads() == 1:
        return None
    operations = sum(count_operations(model, input_size)) * recipe.batch_size
    return 1 if operations < SMALL else None


@contextmanager
def threads_restored() -> Iterator[None]:
    """Inside, the number of threads may be changed; outside, it is as it was."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)
