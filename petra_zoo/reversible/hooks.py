"""Hooks that somebody has registered on a tensor: they run once for each of its gradients, wherever that is found."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn


def stand_ins(tensors: Iterable[Tensor]) -> dict[int, Tensor]:
    """By id, for those of the tensors that have hooks: others of the same content, at whose gradients none runs.

    A gradient that is found inside of a backward pass and then handed to that pass would run them twice.
    """
    return {id(x): _like(x) for x in tensors if x._backward_hooks or (not x.is_leaf and x.retains_grad)}


def through_hooks(x: Tensor, gradient: Tensor) -> Tensor:
    """The gradient of x, found at a stand-in, as the hooks of x leave it."""
    for hook in (x._backward_hooks or {}).values():
        changed = hook(gradient)
        gradient = gradient if changed is None else changed
    return gradient


def _like(x: Tensor) -> Tensor:
    return nn.Parameter(x.detach()) if isinstance(x, nn.Parameter) else x.detach().requires_grad_()
