"""Streams on a fixed-point grid: sums of two multiples of the grid are exact, so that nothing accumulates.

At g = 1 that is all; at g = 2**-m a block adds whole steps of g * a too, and `remainder.py` keeps what they lack.

In 16 bits a stream is *packed* (`packed.py`). The same arithmetic on ordinary floats that are multiples of the grid is
what scripted, exported, traced and hooked networks compute, to the bit. Sums saturate, and what leaves the range is
noted (`Saturation`).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from petra_zoo.reversible.reading import Coupling
from petra_zoo.reversible.saturation import Saturation


def largest(x: Tensor) -> float:
    """How many steps of a grid a float of x's type holds so that sums of two stay exact."""
    return 9007199254740992.0 if x.dtype == torch.float64 else 16777216.0


def rounded(x: Tensor, grid: float, most: float) -> Tensor:
    """x, a float32 or float64, rounded to at most so many multiples of `grid`."""
    return torch.clamp(torch.round(x / grid), -most, most) * grid


def floored(a: Tensor, grid: float, g: Coupling) -> Tensor:
    """g * a, down to a multiple of `grid`, of an `a` that is one."""
    return torch.floor(a * (g / grid)) * grid


def whole_steps(x: Tensor, grid: float) -> Tensor:
    """How many steps of the grid a multiple of it is: an integer as wide as x."""
    return (x / grid).to(torch.int64 if x.dtype == torch.float64 else torch.int32)


def clamped(x: Tensor, grid: float, most: float) -> Tensor:
    """x, a sum of two multiples of `grid`, but at most so many of them."""
    return torch.clamp(x, -most * grid, most * grid)


def to_grid(x: Tensor, grid: float, most: float, saturation: Saturation | None = None) -> Tensor:
    """`rounded`, noting what is beyond; the gradient passes straight through."""
    return _Round.apply(x, grid, most, saturation)


def part_of(a: Tensor, grid: float, g: Coupling) -> Tensor:
    """`floored`; its gradient is g."""
    return _Floor.apply(a, grid, g)


def saturated(x: Tensor, grid: float, most: float, saturation: Saturation | None = None) -> Tensor:
    """`clamped`, noting what is beyond; the gradient passes straight through."""
    if saturation is not None and saturation.note(largest_of(x.detach()) / grid, grid, most):
        return x
    return _Saturate.apply(x, grid, most)


def largest_of(steps: Tensor) -> Tensor:
    """The largest absolute value, 0-d; not a number where one is not."""
    if not steps.numel():
        return steps.new_zeros(())
    low, high = torch.aminmax(steps)
    return torch.maximum(high, -low)


torch.fx.wrap("largest")
torch.fx.wrap("to_grid")
torch.fx.wrap("part_of")
torch.fx.wrap("saturated")


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, grid: float, most: float, saturation: Saturation | None) -> Tensor:
        # `rounded`, in one tensor; float16 holds what is in range, but not how many steps it is.
        steps = (x.float() if x.dtype == torch.float16 else x).div(grid).round_()
        in_range = saturation is not None and saturation.note(largest_of(steps), grid, most)
        return (steps if in_range else steps.clamp_(-most, most)).mul_(grid).to(x.dtype)

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return gradients[0], None, None, None


class _Floor(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, a: Tensor, grid: float, g: Coupling) -> Tensor:
        ctx.g = g
        return (a * (g / grid)).floor_().mul_(grid)  # `floored`

    @staticmethod
    def backward(ctx: _Context, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0] * ctx.g, None, None


class _Saturate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, grid: float, most: float) -> Tensor:
        return clamped(x, grid, most)

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0], None, None


class _Context(FunctionCtx):
    g: Coupling
