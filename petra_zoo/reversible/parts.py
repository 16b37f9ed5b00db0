"""Branches evaluated in parts, so that not even one branch's whole graph stands at the peak of a step.

Going backwards through a coupled block, the gradient of F(h) is known before F(h) is: each part is evaluated and
differentiated at once, and its graph is gone before the next part's is built. Value and gradients are added up; the
work is that of the branch as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from petra_zoo.errors import UserError
from petra_zoo.reversible.ownership import apart

Function = Callable[[Tensor], Tensor]
Drop = Callable[[Tensor], Tensor | None]


class Pulled(NamedTuple):
    """What a branch gives on the way back.

    Attributes:
        value: F(h).
        d_h: the gradient of h.
        d_parameters: those of the parameters, in their order; None counts as zero.
    """

    value: Tensor
    d_h: Tensor
    d_parameters: tuple[Tensor | None, ...]


class PartedBranch:
    """A branch F: [B, ..., C] -> [B, ..., C] that is evaluated part by part, in the forward as on the way back.

    Random numbers are drawn in the same order both times: those of the whole branch first, then those of each part.

    Args:
        parts: how many there are.
        drop: what drops the branch as a whole, such as stochastic depth: from h to the factor that its mask is; None:
            it is not dropped.
    """

    def __init__(self, parts: int, drop: Drop | None = None) -> None:
        self.parts = parts
        self._drop = drop

    def __call__(self, h: Tensor) -> Tensor:
        """F(h)."""
        factor = self._factor(h)
        f = self._value(h)
        return f if factor is None else f * factor

    def pull(self, h: Tensor, d_f: Tensor, parameters: Sequence[Tensor]) -> Pulled:
        """F(h) and its vector-Jacobian product with d_f, which has h's shape.

        Args:
            h: without a graph.
            d_f: the gradient of F(h).
            parameters: the parameters whose gradients are wanted.
        """
        factor = self._factor(h)
        pulled = self._pull(h, d_f if factor is None else d_f * factor, parameters)
        return pulled if factor is None else pulled._replace(value=pulled.value.mul_(factor))

    def _factor(self, h: Tensor) -> Tensor | None:
        return None if self._drop is None else self._drop(h)

    def _value(self, h: Tensor) -> Tensor:
        raise NotImplementedError

    def _pull(self, h: Tensor, d_f: Tensor, parameters: Sequence[Tensor]) -> Pulled:
        raise NotImplementedError


def parts_of(branch: Function) -> int:
    """In how many parts a branch is evaluated."""
    return branch.parts if isinstance(branch, PartedBranch) else 1


class RowChunks(PartedBranch):
    """A branch that treats every token alike, such as a norm and an MLP: so many tokens at a time.

    Args:
        function: F of tokens [n, C].
        chunks: how many parts all tokens of the batch are cut into.
        drop: see `PartedBranch`.
    """

    def __init__(self, function: Function, chunks: int, drop: Drop | None = None) -> None:
        super().__init__(check_chunks(chunks), drop)
        self._function = function

    def _value(self, h: Tensor) -> Tensor:
        rows = h.flatten(0, -2)
        return torch.cat([self._function(rows[chunk]) for chunk in self._chunks(len(rows))]).view(h.shape)

    def _pull(self, h: Tensor, d_f: Tensor, parameters: Sequence[Tensor]) -> Pulled:
        rows, d_rows = h.flatten(0, -2), d_f.flatten(0, -2)
        value: Tensor | None = None
        d_h, sums = torch.empty_like(rows), _Sums(parameters)
        for chunk in self._chunks(len(rows)):
            part = _Part(self._function, rows[chunk])
            value = part.value().new_empty(rows.shape) if value is None else value
            value[chunk] = part.give()
            d_h[chunk] = sums.add(part.gradients(d_rows[chunk], parameters))
        assert value is not None
        return Pulled(value.view(h.shape), d_h.view(h.shape), tuple(sums.sums))

    def _chunks(self, rows: int) -> Iterator[slice]:
        bounds = [rows * i // self.parts for i in range(self.parts + 1)]
        return (slice(*ends) for ends in pairwise(bounds) if ends[0] < ends[1])


class SummedParts(PartedBranch):
    """A branch that is a sum of functions of something shared, such as the heads of an attention of a norm.

    Args:
        shared: h -> n, [B, ..., C].
        functions: F(h) is the sum of what they give for n.
        drop: see `PartedBranch`.
    """

    def __init__(self, shared: Function, functions: Sequence[Function], drop: Drop | None = None) -> None:
        super().__init__(len(functions), drop)
        self._shared, self._functions = shared, functions

    def _value(self, h: Tensor) -> Tensor:
        n = self._shared(h)
        value = self._functions[0](n)
        for function in self._functions[1:]:
            value = value + function(n)
        return value

    def _pull(self, h: Tensor, d_f: Tensor, parameters: Sequence[Tensor]) -> Pulled:
        shared = _Part(self._shared, h)
        n, value, d_n = shared.give(), None, None
        sums = _Sums(parameters)
        for function in self._functions:
            part = _Part(function, n)
            value = part.give() if value is None else value.add_(part.give())
            of_part = sums.add(part.gradients(d_f, parameters))
            d_n = of_part if d_n is None else d_n.add_(of_part)
        assert value is not None
        assert d_n is not None
        del n
        return Pulled(value, sums.add(shared.gradients(d_n, parameters)), tuple(sums.sums))


class _Part:
    """A function of x with its graph.

    Args:
        function: x -> f.
        x: without a graph.
    """

    def __init__(self, function: Function, x: Tensor) -> None:
        self._x = x.detach().requires_grad_()
        with torch.enable_grad():
            f = function(self._x)
        self._given, self._graph = [f.detach()], get_gradient_edge(f)

    def value(self) -> Tensor:
        """f."""
        return self._given[0]

    def give(self) -> Tensor:
        """f, once: its caller may let it die before the graph is walked."""
        return self._given.pop()

    def gradients(self, d_f: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        """Those of x and of the parameters; then the graph is gone."""
        return apart(torch.autograd.grad(self._graph, [self._x, *parameters], d_f, allow_unused=True), (d_f,))


class _Sums:
    """Gradients of parameters, added up; none for one that nothing has read."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.sums: list[Tensor | None] = [None] * len(parameters)

    def add(self, gradients: Sequence[Tensor | None]) -> Tensor:
        """Adds the gradients behind the first, and gives that: what the part reads has one."""
        of_input, *of_parameters = gradients
        assert of_input is not None
        for i, d in enumerate(of_parameters):
            if d is not None:
                mine = self.sums[i]
                self.sums[i] = d if mine is None else mine.add_(d)
        return of_input


def check_chunks(chunks: int) -> int:
    """Returns it.

    Raises:
        UserError: it is not 1 or more.
    """
    if chunks < 1:
        raise UserError(f"chunks is 1 (a branch as a whole) or more, not {chunks}")
    return chunks
