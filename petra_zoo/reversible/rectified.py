"""relu of two streams, and a gradient that passes one: where a step moves whole streams, each a kernel on a GPU.

To the bit what the operations they are made of give, of which each reads and writes streams of its own.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from petra_zoo.reversible.fused import Fused, Results


def merge_rectified(b: Tensor, a: Tensor) -> Tensor:
    """(relu(b) + relu(a)) / 2, the merge at g = 1: of two streams [B, ...], a tensor like each."""
    return _MeanOfRectified.apply(b, a)


def add_passed(d: Tensor | None, d_h: Tensor, b: Tensor, over: bool = False) -> Tensor:
    """d plus what of d_h, the gradient of h = relu(b), reaches b.

    Args:
        d: the gradient that b has from elsewhere, [B, ...]; None counts as zero.
        d_h: likewise.
        b: likewise.
        over: it may be written over d.
    """
    if d is None:
        return _passed(d_h, b)
    if d.dtype == d_h.dtype and _add_passed.is_one_kernel(d, d_h, b):
        return _add_passed(d, d_h, b)[0]
    return d.add_(_passed(d_h, b)) if over else d + _passed(d_h, b)


def _passed(d_h: Tensor, b: Tensor) -> Tensor:
    return torch.ops.aten.threshold_backward(d_h, b, 0.0)  # relu's own backward: where b > 0


@Fused
def _add_passed(d: Tensor, d_h: Tensor, b: Tensor) -> Results:
    return (d + _passed(d_h, b),)


@Fused
def _mean(b: Tensor, a: Tensor) -> Results:
    return (torch.relu(b).add_(torch.relu(a)).div_(2.0),)


@Fused
def _halves_passed(d: Tensor, b: Tensor, a: Tensor) -> Results:
    half = d / 2.0
    return _passed(half, b), _passed(half, a)


class _Context(Protocol):
    saved_tensors: tuple[Tensor, ...]

    def save_for_backward(self, *tensors: Tensor) -> None: ...


class _MeanOfRectified(torch.autograd.Function):
    """It keeps the streams, which whoever goes backwards through a run holds anyway."""

    generate_vmap_rule = True

    @staticmethod
    def forward(b: Tensor, a: Tensor) -> Tensor:
        return _mean(b, a)[0]

    @staticmethod
    def setup_context(ctx: _Context, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: _Context, *gradients: Tensor) -> Results:
        return _halves_passed(gradients[0], *ctx.saved_tensors)
