"""The activation in front of a branch, which stands in memory only while somebody looks at it.

A coupled block's h = act(b) is as wide as a stream. The branch's first layer reads it, and that layer's backward once
more; in between, while the widest tensors of the branch stand beside the streams, nobody does. There it is let go of,
to be computed anew from b, unless the step's memory peaks elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge, saved_tensors_hooks

from petra_zoo.reversible.rectified import add_passed
from petra_zoo.reversible.state import version_of

# Nodes of functions that give the same whenever they are asked: torch's activations that draw nothing, and the merge.
_LIGHT = {"_UnpackBackward", "_RectifyBackward", "_MeanRectifiedBackward", "_MeanOfRectifiedBackward"}  # of streams
# Each has one operand, or operands that all have a node: a sum with a tensor that has none may be with a drawn one.
_PURE = _LIGHT | frozenset(
    f"{name}Backward0"
    for name in (
        *("Relu", "Hardtanh", "LeakyRelu", "Elu", "Silu", "Gelu", "Mish", "Sigmoid", "Tanh"),
        *("Hardswish", "Hardsigmoid", "Softplus", "ToCopy"),
    )
)
_PURE |= {"_MergedBackward"}
_LEAF = "torch::autograd::AccumulateGrad"


class Activation:
    """h = act(b): given to a branch, forgotten, and computed anew for the branch's backward.

    Args:
        activate: act.
        b: the stream.
        is_relu: whether act is relu of numbers, whose gradient asks for b alone.
        frugal: whether h is forgotten; else the branch's graph keeps it.

    Attributes:
        start: where the gradient of h arrives in the branch's graph; there once h was given.
    """

    start: GradientEdge

    def __init__(
        self, activate: Callable[[Tensor], Tensor], b: Tensor, is_relu: bool = False, frugal: bool = True
    ) -> None:
        self._activate, self._is_relu, self._frugal = activate, is_relu, frugal
        self._b = b.detach().requires_grad_()
        self._forgotten: Node | None = None  # the node of the h that was given, unless h is kept
        self._h: Tensor | None = None  # with its graph from b

    def give(self) -> Tensor:
        """h, for the branch. Whoever binds no name to it lets it die as soon as the branch is through with it."""
        h = self._activate(self._b)
        if not h.requires_grad:  # nobody asks for gradients
            self.start = get_gradient_edge(self._b)
            return h
        if self._frugal and is_pure(h):
            h = _Unheld.apply(self._b, h.detach())
            self._forgotten = h.grad_fn
        else:
            self._h = h
        self.start = get_gradient_edge(h)
        return h

    def value(self) -> Tensor:
        """h, without a graph."""
        return self._activate(self._b.detach()) if self._h is None else self._h.detach()

    def gradient(self, d_h: Tensor, beside: Tensor | None = None, over: bool = False) -> Tensor:
        """The gradient of b.

        Args:
            d_h: that of h.
            beside: what b gets besides; None counts as zero.
            over: it may be written over `beside`.
        """
        if self._is_relu:
            self._h = None
            return add_passed(beside, d_h, self._b.detach(), over)
        h, self._h = self._again(), None
        d_b = d_h if h is self._b else torch.autograd.grad(h, self._b, d_h)[0]
        if beside is None:
            return d_b
        return beside.add_(d_b) if over else beside + d_b

    @contextmanager
    def forgetting(self) -> Iterator[None]:
        """Around the branch: its graph keeps no h."""
        with saved_tensors_hooks(self._pack, self._unpack) if self._frugal else nullcontext():
            yield

    def _pack(self, x: Tensor) -> tuple[Tensor, int] | None:
        if self._forgotten is not None and x.grad_fn is self._forgotten:
            return None
        # A result that its own node saved would hold it, and so itself.
        return x if x.grad_fn is None else x.detach(), version_of(x)

    def _unpack(self, kept: tuple[Tensor, int] | None) -> Tensor:
        if kept is None:
            return self._again().detach()
        x, version = kept
        if version_of(x) != version:  # torch's own look ends where hooks are
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"a tensor of shape {list(x.shape)} inside of a branch; let it work on a copy"
            )
        return x

    def _again(self) -> Tensor:
        if self._h is None:
            with torch.enable_grad():
                self._h = self._activate(self._b)
        return self._h


def is_pure(h: Tensor) -> bool:
    """Whether h comes from leaves through functions that another evaluation would give the same, and is no leaf."""
    nodes = [h.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node.name() not in _PURE:
            return False
        nodes += [below for below, _ in node.next_functions if below is not None and below.name() != _LEAF]
    return True


def is_light(h: Tensor) -> bool:
    """Whether the graph of h keeps next to nothing: signs, where others keep tensors as wide as a stream."""
    return h.grad_fn is not None and h.grad_fn.name() in _LIGHT


class _Context(Protocol):
    """Nothing is kept."""


class _Unheld(torch.autograd.Function):
    """h at the start of a graph that does not hold it, as the node of a leaf would; no gradient goes beyond it."""

    @staticmethod
    def forward(ctx: _Context, b: Tensor, h: Tensor) -> Tensor:
        return h.detach()

    @staticmethod
    def backward(ctx: _Context, *gradients: Tensor) -> tuple[None, None]:
        return None, None
