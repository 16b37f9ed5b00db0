"""Units whose activation goes several ways that are added up, a down-sampling block's branch and its shortcut."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from petra_zoo.reversible.activation import is_light, is_pure
from petra_zoo.reversible.stream_type import StreamType
from petra_zoo.reversible.unit import FunctionUnit, Reversal, Streams
from petra_zoo.reversible.vector_jacobian import Gradients, edge_of, gradients_of


class ForkedUnit(FunctionUnit):
    """A unit without an inverse that gives one stream, the sum of way(h) over its ways, with h = enter(*streams).

    Recomputed as a whole it would hold the graphs of all ways at once, and that of `enter` with them, which merges two
    streams as wide as any. They are taken one after the other.

    Args:
        name: the unit's place in its model.
        function: the unit: streams -> (sum,).
        modules: see `FunctionUnit`.
        enter: streams -> h.
        ways: h -> a term of the sum, in the order in which `function` evaluates them; each one's gradient is the sum's.
        streams: see `FunctionUnit`.
    """

    def __init__(
        self,
        name: str,
        function: Callable[..., Streams],
        modules: dict[str, nn.Module],
        enter: Callable[..., Tensor],
        ways: Sequence[Callable[[Tensor], Tensor]],
        streams: Callable[[], StreamType] | None = None,
    ) -> None:
        super().__init__(name, function, modules, streams)
        self.enter, self.ways = enter, ways

    def recompute(
        self,
        inputs: Streams,
        output_gradients: Gradients,
        parameters: Sequence[Tensor],
        needs_input_gradient: bool = True,
        *,
        owned: bool = False,
    ) -> Reversal:
        if not needs_input_gradient:
            return super().recompute(inputs, output_gradients, parameters, needs_input_gradient)
        leaves = tuple(x.detach().requires_grad_() for x in inputs)
        gradients: list[Tensor | None] = [None] * (1 + len(parameters))
        with self.untouched():
            with torch.enable_grad():
                h = self.enter(*leaves)
            again = h is leaves[0] or (is_pure(h) and not is_light(h))  # what draws is evaluated once
            entered = None if again else edge_of(h)
            start = h.detach().requires_grad_()
            del h
            for way in self.ways:
                with torch.enable_grad():
                    end = edge_of(way(start))
                found = gradients_of((end,), output_gradients, [start, *parameters])
                gradients = [
                    x if y is None else y if x is None else x.add_(y) for x, y in zip(gradients, found, strict=True)
                ]
                del found, end
            del start
            d_h, *d_parameters = gradients
            del gradients
            if not again:
                of_inputs = gradients_of((entered,), (d_h,), leaves)
            else:
                with torch.enable_grad():
                    end = _Handing.apply(self.enter(*leaves), [d_h])
                del d_h
                of_inputs = gradients_of((end,), (torch.ones_like(end),), leaves)
        return Reversal(inputs, of_inputs, tuple(d_parameters))


class _Context(Protocol):
    box: list[Tensor | None]


class _Handing(torch.autograd.Function):
    """Hands a gradient to the graph of h, which frees it where it has passed; torch.autograd.grad would hold it."""

    @staticmethod
    def forward(ctx: _Context, h: Tensor, box: list[Tensor | None]) -> Tensor:
        ctx.box = box
        return h.new_zeros(())

    @staticmethod
    def backward(ctx: _Context, *gradients: Tensor) -> tuple[Tensor | None, None]:
        return ctx.box.pop(), None
