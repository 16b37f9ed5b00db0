"""What an operation gives on the meta device is found once, and is what it would be found to be again."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from petra_zoo.reversible.shape_memo import ShapeMemo


class Counting(TorchDispatchMode):
    """Calls operations through a memo, below which it counts those that are run."""

    def __init__(self) -> None:
        super().__init__()
        self.memo, self.run = ShapeMemo(), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with _Below(self):
            return self.memo.call(func, args, kwargs or {})


class _Below(TorchDispatchMode):
    def __init__(self, above: Counting) -> None:
        super().__init__()
        self.above = above

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.above.run += func is not torch.ops.aten.empty_strided.default
        return func(*args, **(kwargs or {}))


def meta(*size: int) -> Tensor:
    return torch.empty(size, device="meta")


def test_the_same_question_is_asked_once_and_answered_with_a_new_tensor() -> None:
    a, b = meta(3, 4), meta(4, 5).t().contiguous().t()
    with Counting() as counting:
        first, second = a @ b, a @ b
    assert counting.run == 1
    assert (first.shape, first.stride(), first.dtype) == (second.shape, second.stride(), second.dtype)
    assert first.untyped_storage()._cdata != second.untyped_storage()._cdata


def test_other_shapes_strides_and_arguments_are_other_questions() -> None:
    integers = torch.empty(3, 3, dtype=torch.int64, device="meta")
    with Counting() as counting:
        assert (integers + 1).dtype == torch.int64
        assert (integers + 1.0).dtype == torch.float32
        assert (integers + True).dtype == torch.int64
        assert (integers.double() + 1).dtype == torch.float64
        assert meta(3, 3).sum(0).shape == (3,)
        assert meta(3, 3).sum(0, keepdim=True).shape == (1, 3)
        assert (meta(2, 3).exp().stride(), meta(3, 2).t().exp().stride()) == ((3, 1), (1, 2))
    assert counting.run > 7


def test_views_and_what_is_written_into_stay_what_they_are() -> None:
    x = meta(4, 4)
    with Counting():
        for _ in range(2):
            assert x.view(16).untyped_storage()._cdata == x.untyped_storage()._cdata
            assert x.add_(1) is x


def test_tensors_with_values_are_computed() -> None:
    x = torch.ones(3)
    with Counting():
        assert [float((x * 2).sum()), float((x * 2).sum())] == [6.0, 6.0]
        x.add_(1)
        assert float((x * 2).sum()) == 12.0
