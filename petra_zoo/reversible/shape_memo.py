"""What operations give on the meta device, asked once: to find shapes, many of them run through Python."""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from petra_zoo.reversible.operands import Operand


class _Shape(NamedTuple):
    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


class ShapeMemo:
    """Calls operations from inside a dispatch mode; those that were asked the same before are not run again.

    Only tensors on the meta device are alike when their shapes are: all others, and operations that write into a tensor
    or give one that shares memory with another, are run each time.
    """

    def __init__(self) -> None:
        self._answers: dict[Hashable, object] = {}

    def call(self, func: torch._ops.OpOverload, args: tuple[Operand, ...], kwargs: dict[str, Operand]) -> object:
        """What `func` gives for these arguments."""
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if not tensors or not all(x.is_meta for x in tensors) or func._schema.is_mutable:
            return func(*args, **kwargs)
        question = (func, _frozen(args), *((name, _frozen(x)) for name, x in kwargs.items()))
        if question in self._answers:
            return _thawed(self._answers[question])
        answer = func(*args, **kwargs)
        given = {x.untyped_storage()._cdata for x in tensors}
        made = [x for x in tree_leaves(answer) if isinstance(x, Tensor)]
        if not any(x.untyped_storage()._cdata in given for x in made):
            self._answers[question] = _frozen(answer)
        return answer


def _frozen(x: object) -> Hashable:
    """Something that is equal for equal arguments; 1 and True are not."""
    if isinstance(x, Tensor):
        return _Shape(x.size(), x.stride(), x.dtype)
    if isinstance(x, list | tuple):
        return (type(x), *map(_frozen, x))
    return type(x), x


def _thawed(x: object) -> object:
    """What `_frozen` was made of, with new tensors."""
    if isinstance(x, _Shape):
        return torch.empty_strided(x.size, x.stride, dtype=x.dtype, device="meta")
    assert isinstance(x, tuple)
    kind, *content = x
    return kind(map(_thawed, content)) if kind in (list, tuple) else content[0]
