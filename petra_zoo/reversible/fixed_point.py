"""Streams on a fixed-point grid: sums of two multiples of the grid are exact, so that at g = 1 nothing accumulates.

In 16 bits a stream is *packed*: whole steps of the grid, int16 in a tensor of type bfloat16, so that autograd sees a
float whose gradients are bfloat16. Its bits are no number of that type: only the functions here may look at them, and a
packed stream never leaves the units of a run. The same arithmetic on ordinary floats that are multiples of the grid
(`to_grid`, `saturated`) is what plain, scripted, exported and traced networks compute, to the bit.

Sums saturate. What leaves the range is noted on the device (`Saturation`).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from petra_zoo.reversible.operands import Operand
from petra_zoo.reversible.saturation import Saturation

LARGEST_PACKED = 32767.0  # steps of the grid; the same below zero


def largest(x: Tensor) -> float:
    """How many steps of a grid a float of x's type holds so that sums of two stay exact."""
    return 9007199254740992.0 if x.dtype == torch.float64 else 16777216.0


def rounded(x: Tensor, grid: float, most: float) -> Tensor:
    """x, a float32 or float64, rounded to at most so many multiples of `grid`."""
    return torch.clamp(torch.round(x / grid), -most, most) * grid


def clamped(x: Tensor, grid: float, most: float) -> Tensor:
    """x, a sum of two multiples of `grid`, but at most so many of them."""
    return torch.clamp(x, -most * grid, most * grid)


def to_grid(x: Tensor, grid: float, most: float, saturation: Saturation | None = None) -> Tensor:
    """`rounded`, noting what is beyond; the gradient passes straight through."""
    return _Round.apply(x, grid, most, saturation)


def saturated(x: Tensor, grid: float, most: float, saturation: Saturation | None = None) -> Tensor:
    """`clamped`, noting what is beyond; the gradient passes straight through."""
    return _Saturate.apply(x, grid, most, saturation)


torch.fx.wrap("largest")
torch.fx.wrap("to_grid")
torch.fx.wrap("saturated")


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, grid: float, most: float, saturation: Saturation | None) -> Tensor:
        if saturation is not None:
            saturation.see(torch.round(x / grid), grid, most)
        return rounded(x, grid, most)

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return gradients[0], None, None, None


class _Saturate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, grid: float, most: float, saturation: Saturation | None) -> Tensor:
        if saturation is not None:
            saturation.see(x / grid, grid, most)
        return clamped(x, grid, most)

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return gradients[0], None, None, None


# -- packed streams ---------------------------------------------------------------------------------------------------


def pack(x: Tensor, grid: float, saturation: Saturation | None = None) -> Tensor:
    """The packed stream, or step that is added to one, nearest to x; its gradient is passed on in x's own type."""
    return _Pack.apply(x, grid, saturation)


def unpack(b: Tensor, grid: float) -> Tensor:
    """A packed stream as float32; its gradient is rounded to bfloat16."""
    return _Unpack.apply(b, grid)


def rectify(b: Tensor, grid: float, dtype: torch.dtype) -> Tensor:
    """relu of a packed stream, in the type of a branch; the same bits as relu(unpack(b)).to(dtype)."""
    return _Rectify.apply(b, grid, dtype)


def packed_sum(f: Tensor, a: Tensor, grid: float, saturation: Saturation | None = None) -> Tensor:
    """pack(f) plus the packed stream a."""
    return _PackedSum.apply(f, a, grid, saturation)


def packed_difference(b_out: Tensor, step: Tensor) -> Tensor:
    """The packed stream a of b_out = step + a, all of them packed; no gradient."""
    a = b_out.view(torch.int16).to(torch.int32).sub_(step.view(torch.int16))
    return a.clamp_(-32767, 32767).to(torch.int16).view(torch.bfloat16)


def _steps(x: Tensor, grid: float) -> Tensor:
    """How many steps of the grid x is, rounded to whole ones, as a new float32 (or float64)."""
    wide = x if x.dtype == torch.float64 else x.float()
    return torch.round_(wide * (1.0 / grid))  # exact but for the rounding: a grid is a power of two


def _as_bits(steps: Tensor) -> Tensor:
    return steps.clamp_(-LARGEST_PACKED, LARGEST_PACKED).to(torch.int16).view(torch.bfloat16)


class _Context:
    """What the functions below keep between forward and backward."""

    dtype: torch.dtype
    saved_tensors: tuple[Tensor, ...]

    def save_for_backward(self, *tensors: Tensor) -> None: ...


class _Pack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, x: Tensor, grid: float, saturation: Saturation | None) -> Tensor:
        ctx.dtype = x.dtype
        steps = _steps(x, grid)
        if saturation is not None:
            saturation.see(steps, grid, LARGEST_PACKED)
        return _as_bits(steps)

    @staticmethod
    def backward(ctx: _Context, *gradients: Tensor) -> tuple[Operand, ...]:
        return gradients[0].to(ctx.dtype), None, None


class _Unpack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, b: Tensor, grid: float) -> Tensor:
        return b.view(torch.int16).to(torch.float32).mul_(grid)

    @staticmethod
    def backward(ctx: _Context, *gradients: Tensor) -> tuple[Operand, ...]:
        return gradients[0].to(torch.bfloat16), None


class _Rectify(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, b: Tensor, grid: float, dtype: torch.dtype) -> Tensor:
        h = b.view(torch.int16).clamp_min(0).to(dtype).mul_(grid)
        ctx.save_for_backward(h)  # which the branch's first operation keeps as well
        return h

    @staticmethod
    def backward(ctx: _Context, *gradients: Tensor) -> tuple[Operand, ...]:
        (h,) = ctx.saved_tensors
        return torch.ops.aten.threshold_backward(gradients[0], h, 0).to(torch.bfloat16), None, None


class _PackedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, f: Tensor, a: Tensor, grid: float, saturation: Saturation | None) -> Tensor:
        ctx.dtype = f.dtype
        steps = _steps(f, grid)
        if saturation is not None:
            saturation.see(steps, grid, LARGEST_PACKED)
        steps.clamp_(-LARGEST_PACKED, LARGEST_PACKED).add_(a.view(torch.int16))
        if saturation is not None:
            saturation.see(steps, grid, LARGEST_PACKED)
        return _as_bits(steps)

    @staticmethod
    def backward(ctx: _Context, *gradients: Tensor) -> tuple[Operand, ...]:
        return gradients[0].to(ctx.dtype), gradients[0], None, None
