"""The coupling of two streams: the one formula of petra-zoo.

State: two streams (a, b). A coupled block with input activation h = act(b) and residual branch F computes

    b' = (1 - g) * h + g * a + F(h)        a' = b

g is the coupling. g = 1 is the coupling of RevNet (Gomez et al. 2017) and PETRA (arXiv 2406.02052, Eq. 5), g = 0 is
the ordinary ResNet. For g > 0 the block has an inverse: b = a', and a follows from b' with one evaluation of F.

A run of blocks *starts* from one stream (a = h, which makes the first block an ordinary residual block) and ends with
the *merge* of both streams into one activation. Rounding errors grow by about 1/g per inverted block.

These functions are plain tensor arithmetic: they are scripted, traced and exported with the models that call them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from petra_zoo.errors import UserError

COUPLING_STEPS = 256  # a coupling is a multiple of 1/256: exact in bfloat16 and float16


def as_stream(x: Tensor) -> Tensor:
    """x in the type of streams: at least float32, so that the inverse stays accurate."""
    if x.dtype == torch.float64:
        return x
    return x.float()


# In these four g is a float or, where its value cannot be read (see `readable`), a 0-d tensor: then the general
# formula, which holds for any g. TorchScript knows the first alone, hence the annotations.


def advance(h: Tensor, f: Tensor, g: float) -> Tensor:
    """(1 - g) * h + F(h): what a block adds to g * a. Both tensors have the shape of a stream."""
    if _is_number(g):
        if g == 1.0:
            return f
        if g == 0.0:
            return h + f
    return (1.0 - g) * h + f


def couple(step: Tensor, a: Tensor, g: float) -> Tensor:
    """b' = step + g * a, with step from `advance`."""
    if _is_number(g):
        if g == 1.0:
            return step + a
    return step + g * a


def uncouple(b_out: Tensor, step: Tensor, g: float) -> Tensor:
    """The inverse of `couple`: the stream a of the block's input, for g > 0."""
    if g == 1.0:
        return b_out - step
    return (b_out - step) / g


def merge(h: Tensor, h_before: Tensor, g: float) -> Tensor:
    """Merges the streams at the end of a run: (act(b) + g * act(a)) / (1 + g), from the two activations."""
    return (h + g * h_before) / (1.0 + g)


def _is_number(g: float) -> bool:
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


class _Snap(torch.autograd.Function):
    """Rounds to a grid; the gradient passes straight through."""

    @staticmethod
    def forward(ctx: object, x: Tensor, grid: float) -> Tensor:
        return torch.round(x / grid) * grid

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def snap(x: Tensor, grid: float) -> Tensor:
    """Rounds a stream to multiples of `grid` (a power of two), with a straight-through gradient.

    On the grid the sums of `couple` and `uncouple` are exact at g = 1, so reconstruction is exact to the bit.

    Raises:
        ValueError: see `check_range`.
    """
    if torch.jit.is_scripting():
        return torch.round(x / grid) * grid
    check_range(x, grid)
    return _Snap.apply(x, grid)


def check_range(x: Tensor, grid: float) -> None:
    """Checks that a stream is small enough to lie on the grid in its own type.

    Reads the largest absolute value back (a device synchronisation): exact mode trades speed for bits. Compiled,
    exported and vectorised networks are not inverted, and not checked.

    Raises:
        UserError: a value is too large.
    """
    if not readable(x):
        return
    limit = grid * 2.0 ** (24 if x.dtype == torch.float32 else 53)
    largest = x.detach().abs().max() if x.numel() else x.new_zeros(())
    if not bool(largest < limit):
        raise UserError(
            f"exact inversion needs |stream| < {limit:g} (grid {grid:g} in {x.dtype}), found {largest.item():g}: "
            "use a coarser grid (a smaller exact_bits) or exact=False"
        )


def readable(x: Tensor) -> bool:
    """Whether the value of x can be read now, and stays what a later run of the same operations would find.

    False while a graph is recorded that will run again (compiled, exported, traced), in torch.func's transforms, whose
    tensors stand for many, for tensor subclasses, and on the meta device.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    return (
        type(x) in (Tensor, torch.nn.Parameter)
        and not x.is_meta
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
    )
