"""Packed streams: whole steps of a grid, int16 in a tensor of type bfloat16.

The type makes autograd see a float whose gradients are bfloat16; the bits are no number of that type. Only the
functions here may look at them, and a packed stream never leaves the units of a run. Each computes, to the bit, what
floats on the grid would (`fixed_point.py`): in float32, rounded to the branch's type at the end.
"""

from __future__ import annotations

import torch
from torch import Tensor

from petra_zoo.reversible.fixed_point import largest_of
from petra_zoo.reversible.fused import Fused, Results
from petra_zoo.reversible.operands import Operand
from petra_zoo.reversible.saturation import Saturation

MOST = 32767  # steps of the grid; the same below zero


def pack(x: Tensor, grid: float, saturation: Saturation | None = None) -> Tensor:
    """The packed stream, or step that is added to one, nearest to x."""
    return _Pack.apply(x, grid, saturation)


def pack_sum(h: Tensor, f: Tensor, grid: float, saturation: Saturation | None = None) -> Tensor:
    """The packed stream nearest to the sum of two numbers: a run's start."""
    return _PackSum.apply(h, f, grid, saturation)


def add(f: Tensor, a: Tensor, grid: float, saturation: Saturation | None = None, dropped: int = 0) -> Tensor:
    """pack(f) plus 2**-dropped of the packed stream a, rounded down, which for the gradient it is not."""
    return _Add.apply(f, a, grid, saturation, dropped)


def subtract(b_out: Tensor, step: Tensor, over: bool = False) -> Tensor:
    """The packed stream a of b_out = step + a, all of them packed; it has no gradient. `over`: written over b_out."""
    (a,) = _subtract(b_out, step)
    return b_out.copy_(a) if over else a


def restore_bits(b_out: Tensor, step: Tensor, low: Tensor, dropped: int, over: bool = False) -> Tensor:
    """`subtract` where bits were dropped, of which `low` is the number: uint8."""
    (a,) = _restore(b_out, step, low, dropped=dropped)
    return b_out.copy_(a) if over else a


def as_integers(b: Tensor) -> Tensor:
    """A packed stream as int16."""
    return b.detach().view(torch.int16)


def unpack(b: Tensor, grid: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """A packed stream as numbers."""
    return _Unpack.apply(b, grid, dtype)


def rectify(b: Tensor, grid: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """relu of a packed stream."""
    return _Rectify.apply(b, grid, dtype)


def mean_rectified(b: Tensor, a: Tensor, grid: float, dtype: torch.dtype) -> Tensor:
    """(relu(b) + relu(a)) / 2 of packed streams: the end of a run."""
    return _MeanRectified.apply(b, a, grid, dtype)


# -- of every element -------------------------------------------------------------------------------------------------


def _steps(x: Tensor, grid: float) -> Tensor:
    return torch.round(x * (1.0 / grid))  # exact but for the rounding: a grid is a power of two


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _bits(steps: Tensor) -> Tensor:
    return torch.clamp(steps, -MOST, MOST).to(torch.int16).view(torch.bfloat16)


def _whole(b: Tensor) -> Tensor:
    return b.view(torch.int16)


@Fused
def _pack(x: Tensor, grid: float) -> Results:
    steps = _steps(_wide(x), grid)
    return _bits(steps), largest_of(steps)


@Fused
def _pack_sum(h: Tensor, f: Tensor, grid: float) -> Results:
    steps = _steps(_wide(h) + f, grid)
    return _bits(steps), largest_of(steps)


@Fused
def _add(f: Tensor, a: Tensor, grid: float, dropped: int) -> Results:
    step = _steps(_wide(f), grid)
    steps = torch.clamp(step, -MOST, MOST) + (_whole(a) >> dropped if dropped else _whole(a))
    return _bits(steps), torch.maximum(largest_of(step), largest_of(steps))


@Fused
def _subtract(b_out: Tensor, step: Tensor) -> Results:
    steps = torch.clamp(_whole(b_out).to(torch.int32) - _whole(step), -MOST, MOST)
    return (steps.to(torch.int16).view(torch.bfloat16),)


@Fused
def _restore(b_out: Tensor, step: Tensor, low: Tensor, dropped: int) -> Results:
    steps = (_whole(b_out).to(torch.int32) - _whole(step)) * 2**dropped + low
    return (torch.clamp(steps, -MOST, MOST).to(torch.int16).view(torch.bfloat16),)


@Fused
def _unpack(b: Tensor, grid: float, dtype: torch.dtype) -> Results:
    return ((_whole(b).to(torch.float32) * grid).to(dtype),)


@Fused
def _rectify(b: Tensor, grid: float, dtype: torch.dtype) -> Results:
    return ((_whole(b).clamp_min(0).to(torch.float32) * grid).to(dtype),)


@Fused
def _mean_rectified(b: Tensor, a: Tensor, grid: float, dtype: torch.dtype) -> Results:
    total = _whole(b).clamp_min(0).to(torch.float32) + _whole(a).clamp_min(0)
    signs = (_whole(b) > 0).to(torch.uint8) + 2 * (_whole(a) > 0).to(torch.uint8)
    return (total * (grid / 2.0)).to(dtype), signs


@Fused
def _where_positive(gradient: Tensor, b: Tensor) -> Results:
    return (torch.where(_whole(b) > 0, gradient, 0.0).to(torch.bfloat16),)


@Fused
def _halves_where_positive(gradient: Tensor, signs: Tensor) -> Results:
    half = (_wide(gradient) / 2.0).to(torch.bfloat16)
    return torch.where((signs & 1) > 0, half, 0.0), torch.where(signs > 1, half, 0.0)


# -- with gradients ---------------------------------------------------------------------------------------------------


class _Context:
    """What the functions below keep between forward and backward."""

    dtypes: tuple[torch.dtype, ...]
    dropped: int
    saved_tensors: tuple[Tensor, ...]

    def save_for_backward(self, *tensors: Tensor) -> None: ...


def _noted(results: Results, grid: float, saturation: Saturation | None) -> Tensor:
    packed, peak = results
    if saturation is not None:
        saturation.note(peak, grid, MOST)
    return packed


class _Pack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, x: Tensor, grid: float, saturation: Saturation | None) -> Tensor:
        ctx.dtypes = (x.dtype,)
        return _noted(_pack(x, grid=grid), grid, saturation)

    @staticmethod
    def backward(ctx: _Context, *gradients: Tensor) -> tuple[Operand, ...]:
        return gradients[0].to(ctx.dtypes[0]), None, None


class _PackSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, h: Tensor, f: Tensor, grid: float, saturation: Saturation | None) -> Tensor:
        ctx.dtypes = (h.dtype, f.dtype)
        return _noted(_pack_sum(h, f, grid=grid), grid, saturation)

    @staticmethod
    def backward(ctx: _Context, *gradients: Tensor) -> tuple[Operand, ...]:
        return (*map(gradients[0].to, ctx.dtypes), None, None)


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _Context, f: Tensor, a: Tensor, grid: float, saturation: Saturation | None, dropped: int
    ) -> Tensor:
        ctx.dtypes, ctx.dropped = (f.dtype,), dropped
        return _noted(_add(f, a, grid=grid, dropped=dropped), grid, saturation)

    @staticmethod
    def backward(ctx: _Context, *gradients: Tensor) -> tuple[Operand, ...]:
        of_a = gradients[0] * 2.0**-ctx.dropped if ctx.dropped else gradients[0]
        return gradients[0].to(ctx.dtypes[0]), of_a, None, None, None


class _Unpack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, b: Tensor, grid: float, dtype: torch.dtype) -> Tensor:
        return _unpack(b, grid=grid, dtype=dtype)[0]

    @staticmethod
    def backward(ctx: _Context, *gradients: Tensor) -> tuple[Operand, ...]:
        return gradients[0].to(torch.bfloat16), None, None


class _Rectify(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, b: Tensor, grid: float, dtype: torch.dtype) -> Tensor:
        h = _rectify(b, grid=grid, dtype=dtype)[0]
        # What the branch's first operation keeps as well; a wider one nobody keeps.
        ctx.save_for_backward(h if dtype == torch.bfloat16 else b)
        return h

    @staticmethod
    def backward(ctx: _Context, *gradients: Tensor) -> tuple[Operand, ...]:
        (kept,) = ctx.saved_tensors
        return _where_positive(gradients[0], kept)[0], None, None


class _MeanRectified(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, b: Tensor, a: Tensor, grid: float, dtype: torch.dtype) -> Tensor:
        mean, signs = _mean_rectified(b, a, grid=grid, dtype=dtype)
        ctx.save_for_backward(signs)  # a fourth of both streams
        return mean

    @staticmethod
    def backward(ctx: _Context, *gradients: Tensor) -> tuple[Operand, ...]:
        return (*_halves_where_positive(gradients[0], *ctx.saved_tensors), None, None)
