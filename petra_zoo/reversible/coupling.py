"""The coupling of two streams: the one formula of petra-zoo.

State: two streams (a, b). A coupled block with input activation h = act(b) and residual branch F computes

    b' = (1 - g) * h + g * a + s * F(h)        a' = b

g is the coupling. g = 1 is the coupling of RevNet (Gomez et al. 2017) and PETRA (arXiv 2406.02052, Eq. 5), g = 0 is
the ordinary ResNet. For g > 0 the block has an inverse: b = a', and a = (b' - (1 - g) * h - s * F(h)) / g follows with
one evaluation of F. The gain s is 1 unless a conversion sets it: 1 + g keeps the effect of a trained branch.

A *whole* block B of which no branch is known has F = B - id, that is b' = s * B(h) + (1 - g - s) * h + g * a.

A run of blocks *starts* from one stream (a = h, which makes the first block an ordinary residual block, without a
gain) and ends with the *merge* of both streams into one activation. Rounding errors grow by about 1/g per inverted
block, unless streams lie on a grid: then g = 2**-m has an exact inverse too (`remainder.py`).

`coupled` states the formula, for units and blocks alike, on the grid of the streams' type; `step_of` is the part of it
that the inverse computes again. What they are made of is plain tensor arithmetic, scripted, traced and exported with
the models that call it.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from petra_zoo.reversible.reading import Coupling
from petra_zoo.reversible.stream_type import FLOAT_STREAMS, StreamType, widened

torch.fx.wrap("widened")  # it decides by a type, which a trace does not know; under the name that it has here

COUPLING_STEPS = 256  # a coupling is a multiple of 1/256: exact in bfloat16 and float16


def advance(h: Tensor, f: Tensor, g: Coupling, gain: Coupling = 1.0, whole: bool = False) -> Tensor:
    """(1 - g) * h + s * F(h): what a block adds to g * a.

    Args:
        h: the block's activation, in the shape of a stream.
        f: F(h), or B(h) of a whole block, likewise.
        g: the coupling.
        gain: s.
        whole: f is B(h).
    """
    if whole:  # what is left of B(h) - h is small beside both: not in 16 bits
        return _scaled(widened(f), gain) + (1.0 - g - gain) * widened(h)
    if _is_number(g):
        if g == 1.0:
            return _scaled(f, gain)
        if g == 0.0 and _is_one(gain):
            return h + f
    return (1.0 - g) * h + _scaled(f, gain)


def couple(step: Tensor, a: Tensor, g: Coupling) -> Tensor:
    """b' = step + g * a, with step from `advance`."""
    if _is_number(g):
        if g == 1.0:
            return step + a
    return step + g * a


def uncouple(
    b_out: Tensor,
    step: Tensor,
    g: float,
    streams: StreamType = FLOAT_STREAMS,
    *,
    remainder: Tensor | None = None,
    over: bool = False,
) -> Tensor:
    """The inverse of `coupled`, with step from `step_of`: the stream a of the block's input, for g > 0.

    Args:
        b_out: the stream b'.
        step: what the block has added to g * a.
        g: the coupling.
        streams: their type.
        remainder: what `StreamType.remainder` kept of a; None: nothing, at g = 1 and of streams on no grid.
        over: a is written over b_out.
    """
    if remainder is not None:
        return streams.restored(b_out, step, g, remainder, over)
    a = streams.difference(b_out, step, over)
    return a if g == 1.0 else a.div_(g)


def merge(h: Tensor, h_before: Tensor, g: Coupling) -> Tensor:
    """Merges the streams at the end of a run: (act(b) + g * act(a)) / (1 + g), from the two activations."""
    if _is_number(g):
        if g == 1.0:
            return (h + h_before).div_(2.0)
    return (h + g * h_before) / (1.0 + g)


def merge_streams(h: Tensor, h_before: Tensor, g: float) -> Tensor:
    """`merge` as one node of a graph, which keeps nothing: of units."""
    return _Merged.apply(h, h_before, g)


class _Context(Protocol):
    g: float


class _Merged(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(h: Tensor, h_before: Tensor, g: float) -> Tensor:
        return merge(h, h_before, g)

    @staticmethod
    def setup_context(ctx: _Context, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
        ctx.g = inputs[2]

    @staticmethod
    def backward(ctx: _Context, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        d = gradients[0] / (1.0 + ctx.g)
        return d, d if ctx.g == 1.0 else ctx.g * d, None


def step_of(
    h: Tensor, f: Tensor, g: Coupling, streams: StreamType, gain: Coupling = 1.0, whole: bool = False
) -> Tensor:
    """(1 - g) * h + s * F(h) as it is added to g * a, in the forward and, the same bits, in the inverse.

    Args:
        h: the block's activation, as a stream.
        f: F(h), or B(h).
        g: the coupling.
        streams: their type.
        gain: s.
        whole: f is B(h) of a whole block.
    """
    return streams.snap(_unrounded(h, f, g, streams, gain, whole))


def coupled(
    h: Tensor,
    f: Tensor,
    a: Tensor | None,
    g: Coupling,
    streams: StreamType,
    gain: Coupling = 1.0,
    whole: bool = False,
) -> Tensor:
    """The formula: b' = (1 - g) * h + g * a + s * F(h), all of them [B, ...] of one shape.

    Args:
        h: the block's activation, as a stream.
        f: F(h), or B(h).
        a: None where there is no second stream: the block starts its run (a = h) or is no part of one, and is an
            ordinary block, without a gain: b' = h + F(h), or B(h) itself.
        g: the coupling.
        streams: their type.
        gain: s.
        whole: f is B(h) of a whole block.
    """
    if a is None:
        return streams.enter(f) if whole else streams.sum_at_0(h, f)
    if streams.on_grid:
        return streams.sum_on_grid(_unrounded(h, f, g, streams, gain, whole), a, g)
    return couple(step_of(h, f, g, streams, gain, whole), a, g)


def _unrounded(h: Tensor, f: Tensor, g: Coupling, streams: StreamType, gain: Coupling, whole: bool) -> Tensor:
    return advance(h if _is_one(g) else streams.precise(h), f, g, gain, whole)


def _scaled(f: Tensor, gain: Coupling) -> Tensor:
    """s * F(h); a product in 16 bits would be rounded before it is added."""
    return f if _is_one(gain) else gain * widened(f)


def _is_one(x: Coupling) -> bool:
    return not isinstance(x, Tensor) and x == 1.0


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
