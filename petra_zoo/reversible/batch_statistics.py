"""Batch-norm statistics in a second evaluation of a unit.

A recomputation with the same parameters knows the batch statistics: the forward remembers mean and inverse standard
deviation, a few numbers per channel, and the recomputation only applies them. On the CPU that gives the same bits at an
eighth of the cost of a train-mode batch norm, which is what reversible backpropagation pays most for after the
convolutions. (Running statistics belong to the first evaluation: `state.py`.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from petra_zoo.reversible.activation import Activation
from petra_zoo.reversible.operands import Operand

_Result = TypeVar("_Result")
Statistics = list[tuple[Tensor, Tensor]]  # mean and inverse standard deviation of each batch norm, in order of calls


class RememberStatistics(TorchFunctionMode):
    """Inside, every eligible batch norm also appends its batch statistics to `statistics`."""

    def __init__(self) -> None:
        super().__init__()
        self.statistics: Statistics = []

    def __torch_function__(
        self,
        func: Callable[..., _Result],
        types: Sequence[type],
        args: tuple[Operand, ...] = (),
        kwargs: dict[str, Operand] | None = None,
    ) -> _Result | Tensor:
        if func is F.batch_norm and (call := _eligible(*args, **(kwargs or {}))):
            y, batch_mean, batch_invstd = torch.native_batch_norm(
                call.x, call.weight, call.bias, call.mean, call.var, True, call.momentum, call.eps
            )
            self.statistics.append((batch_mean, batch_invstd))
            return y
        return func(*args, **(kwargs or {}))


class UseStatistics(TorchFunctionMode):
    """Inside, the same batch norms in the same order apply the remembered statistics, unless they update some."""

    def __init__(self, statistics: Statistics) -> None:
        super().__init__()
        self._remaining = iter(statistics)
        self._task = torch._C._current_graph_task_id()  # what is evaluated in a backward within is a checkpoint's part

    def __torch_function__(
        self,
        func: Callable[..., _Result],
        types: Sequence[type],
        args: tuple[Operand, ...] = (),
        kwargs: dict[str, Operand] | None = None,
    ) -> _Result | Tensor:
        own = func is F.batch_norm and torch._C._current_graph_task_id() == self._task
        if own and (call := _eligible(*args, **(kwargs or {}))):
            statistics = next(self._remaining)
            # Running ones: somebody's own norm, which may read what it updates here.
            if call.mean is None and call.var is None and not _somebody_saves():
                return _KnownBatchNorm.apply(call.x, call.weight, call.bias, *statistics, call.eps)
        return func(*args, **(kwargs or {}))


def _somebody_saves() -> bool:
    """Whether what is saved here goes to hooks that are not our own.

    A checkpoint inside the unit finds it by its order in another evaluation, outside of `UseStatistics`.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and not isinstance(getattr(hooks[0], "__self__", None), Activation)


class _Call(NamedTuple):
    """The arguments of a batch norm in train mode: x [B, C, ...], all others [C] or numbers."""

    x: Tensor
    mean: Tensor | None
    var: Tensor | None
    weight: Tensor
    bias: Tensor
    momentum: float
    eps: float


def _eligible(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> _Call | None:
    """The call's arguments where remembering pays and keeps the bits: an affine train-mode batch norm on the CPU."""
    if not training or x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64):
        return None
    if weight is None or bias is None or weight.dtype != x.dtype or x.numel() <= x.shape[1]:
        return None
    return _Call(x, running_mean, running_var, weight, bias, momentum, eps)


class _Context(Protocol):
    """What `_KnownBatchNorm` keeps between its forward and its backward."""

    eps: float
    needs_input_grad: tuple[bool, ...]
    saved_tensors: tuple[Tensor, ...]

    def save_for_backward(self, *tensors: Tensor) -> None: ...


class _KnownBatchNorm(torch.autograd.Function):
    """Train-mode batch norm whose batch statistics are known."""

    @staticmethod
    def forward(
        ctx: _Context, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, invstd: Tensor, eps: float
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, invstd)
        ctx.eps = eps
        scale = weight * invstd
        # Torch's own kernel for x * scale + shift per channel; addcmul rounds once, as train mode does: the same bits.
        shift = torch.addcmul(bias, mean, scale, value=-1)
        # (F.batch_norm of torch 2.11 refuses eps = 0, which its kernel takes.)
        zero, one = torch.zeros_like(mean), torch.ones_like(mean)
        return torch.batch_norm(x, scale, shift, zero, one, False, 0.0, 0.0, torch.backends.cudnn.enabled)

    @staticmethod
    def backward(ctx: _Context, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, invstd = ctx.saved_tensors
        d_x, d_weight, d_bias = torch.ops.aten.native_batch_norm_backward(
            gradients[0], x, weight, None, None, mean, invstd, True, ctx.eps, list(ctx.needs_input_grad[:3])
        )
        return d_x, d_weight, d_bias, None, None, None
