"""The coupling of two streams: the one formula of petra-zoo.

State: two streams (a, b). A coupled block with input activation h = act(b) and residual branch F computes

    b' = (1 - g) * h + g * a + F(h)        a' = b

g is the coupling. g = 1 is the coupling of RevNet (Gomez et al. 2017) and PETRA (arXiv 2406.02052, Eq. 5), g = 0 is
the ordinary ResNet. For g > 0 the block has an inverse: b = a', and a = (b' - (1 - g) * h - F(h)) / g follows with one
evaluation of F.

A run of blocks *starts* from one stream (a = h, which makes the first block an ordinary residual block) and ends with
the *merge* of both streams into one activation. Rounding errors grow by about 1/g per inverted block.

`coupled` states the formula, for units and blocks alike, on the grid of the streams' type; `step_of` is the part of it
that the inverse computes again. What they are made of is plain tensor arithmetic, scripted, traced and exported with
the models that call it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch import Tensor

from petra_zoo.reversible.stream_type import FLOAT_STREAMS, StreamType

COUPLING_STEPS = 256  # a coupling is a multiple of 1/256: exact in bfloat16 and float16


# A coupling is a float or, where its value cannot be read (see `readable`), a 0-d tensor: then the general formula,
# which holds for any g. TorchScript knows the first alone.
if TYPE_CHECKING:
    Coupling = float | Tensor
else:
    Coupling = float


def advance(h: Tensor, f: Tensor, g: Coupling) -> Tensor:
    """(1 - g) * h + F(h): what a block adds to g * a. Both tensors have the shape of a stream."""
    if _is_number(g):
        if g == 1.0:
            return f
        if g == 0.0:
            return h + f
    return (1.0 - g) * h + f


def couple(step: Tensor, a: Tensor, g: Coupling) -> Tensor:
    """b' = step + g * a, with step from `advance`."""
    if _is_number(g):
        if g == 1.0:
            return step + a
    return step + g * a


def uncouple(
    b_out: Tensor, step: Tensor, g: float, streams: StreamType = FLOAT_STREAMS, *, over: bool = False
) -> Tensor:
    """The inverse of `coupled`, with step from `step_of`: the stream a of the block's input, for g > 0.

    Args:
        b_out: the stream b'.
        step: what the block has added to g * a.
        g: the coupling.
        streams: their type.
        over: a is written over b_out.
    """
    a = streams.difference(b_out, step, over)
    return a if g == 1.0 else a.div_(g)


def merge(h: Tensor, h_before: Tensor, g: Coupling) -> Tensor:
    """Merges the streams at the end of a run: (act(b) + g * act(a)) / (1 + g), from the two activations."""
    if _is_number(g):
        if g == 1.0:
            return (h + h_before).div_(2.0)
    return (h + g * h_before) / (1.0 + g)


def step_of(h: Tensor, f: Tensor, g: Coupling, streams: StreamType) -> Tensor:
    """(1 - g) * h + F(h) as it is added to g * a, in the forward and, the same bits, in the inverse.

    Args:
        h: the block's activation, as a stream.
        f: F(h).
        g: the coupling.
        streams: their type.
    """
    if _is_number(g):
        if g == 1.0:
            return streams.snap(f)
        if g == 0.0:
            return streams.sum_at_0(h, f)
    return streams.snap(advance(h, f, g))


def coupled(h: Tensor, f: Tensor, a: Tensor | None, g: Coupling, streams: StreamType) -> Tensor:
    """The formula: b' = (1 - g) * h + g * a + F(h), all of them [B, ...] of one shape.

    Args:
        h: the block's activation, as a stream.
        f: F(h).
        a: None where there is no second stream: the block starts its run (a = h) or is no part of one, and
            b' = h + F(h).
        g: the coupling.
        streams: their type.
    """
    if a is None:
        return step_of(h, f, 0.0, streams)
    if _is_number(g) and g == 1.0:
        return streams.sum_at_1(f, a)
    return streams.in_range(couple(step_of(h, f, g, streams), a, g))


def _is_number(g: Coupling) -> bool:
    return not isinstance(g, Tensor)


def nearest_coupling(g: float) -> float:
    """The multiple of 1/256 nearest to g: averages of state dicts are off by a rounding error, or lie in between.

    Raises:
        ValueError: g is not between 0 and 1.
    """
    steps = round(g * COUPLING_STEPS) if math.isfinite(g) else -1
    if not 0 <= steps <= COUPLING_STEPS:
        raise ValueError(f"a coupling lies between 0 and 1, not at {g!r}")
    return steps / COUPLING_STEPS
