"""An integer that tells whether a branch was recomputed to the bit."""

from __future__ import annotations

import torch
from torch import Tensor

_WHOLE = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum(x: Tensor) -> Tensor:
    """The sum of the bits of all elements, 0-d: one pass over them, in whatever order they lie.

    Elements are taken as integers as wide as they are, and sums are modulo that: one that differs is always noticed,
    several go unnoticed only where their differences cancel to the bit.

    Args:
        x: floating-point, of any shape.
    """
    whole = _WHOLE[x.element_size()]
    return x.detach().view(whole).sum(dtype=whole)
