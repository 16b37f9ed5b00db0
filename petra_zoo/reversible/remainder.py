"""What g = 2**-m drops of a stream: the m low bits of every element, which an exact inverse needs beside the streams.

On a grid d a stream is a = A d with whole numbers A. At g = 2**-m a block adds floor(A / 2**m) d, and keeps A mod 2**m:
with it the inverse, which finds the floor to the bit, finds A. Kept are 0, 1, 2, 4 or 8 bits per element, packed into
bytes: nothing at g = 1, 1/32 of a float32 at g = 1/2, and at 1/16, where a conversion hardly changes a network, 1/8.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from petra_zoo.errors import UserError

MOST_BITS = 8  # a coupling is a multiple of 1/256


def dropped_bits(g: float) -> int | None:
    """m of g = 2**-m; None: g is none of 1, 1/2, ..., 1/256."""
    mantissa, exponent = math.frexp(g)
    return 1 - exponent if mantissa == 0.5 and 0 <= 1 - exponent <= MOST_BITS else None


def check_exact_coupling(g: float) -> float:
    """Returns g.

    Raises:
        UserError: exact inversion does not take it; gives the nearest that it takes.
    """
    if g == 0.0 or dropped_bits(g) is not None:
        return g
    nearest = min((2.0**-m for m in range(MOST_BITS + 1)), key=lambda power: abs(power - g))
    raise UserError(f"exact inversion takes couplings of 1, 1/2, 1/4, ... and 0, not {g:g}: the nearest is {nearest:g}")


def pack_bits(low: Tensor, bits: int) -> Tensor:
    """Numbers below 2**bits, one a byte, as few bytes as they fill.

    Args:
        low: uint8, of any shape.
        bits: 1 to 8; what is not 1, 2, 4 or 8 is rounded up.

    Returns:
        uint8 [ceil(numel / (8 // bits))].
    """
    width = _width(bits)
    parts = 8 // width
    flat = low.reshape(-1)
    if parts == 1:
        return flat
    # Element i shares a byte with elements i + n, i + 2 n, ...: whole rows are shifted, not single elements.
    rows = F.pad(flat, (0, -flat.numel() % parts)).view(parts, -1)
    packed = rows[0].clone()
    for i in range(1, parts):
        packed |= rows[i] << (i * width)
    return packed


def unpack_bits(packed: Tensor, bits: int, shape: torch.Size) -> Tensor:
    """The inverse of `pack_bits`: uint8 of the shape that was packed."""
    width = _width(bits)
    parts = 8 // width
    if parts == 1:
        return packed.view(shape)
    rows = torch.empty(parts, packed.numel(), dtype=torch.uint8, device=packed.device)
    for i, row in enumerate(rows):
        torch.bitwise_right_shift(packed, i * width, out=row)
    return rows.bitwise_and_(2**width - 1).view(-1)[: shape.numel()].view(shape)


def _width(bits: int) -> int:
    return 1 << (bits - 1).bit_length()
