"""Weights cast to autocast's type once per update, instead of in every evaluation of a unit.

Autocast casts the weight of a convolution or a linear layer each time the layer is called: twice per tick under PETRA,
in a kernel and an operation of its own. Here all weights of a stage are cast in one operation, into copies that stay
where they are, and the copies stand in for the weights while a unit is evaluated. Both round alike: the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from petra_zoo.reversible import Unit
from petra_zoo.reversible.state import version_of

# Layers whose weights autocast casts as they are: others, such as timm's that standardise theirs, compute with them.
_CAST = {kind.forward for kind in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)}


class _Copy(NamedTuple):
    """A copy that stands in for a weight in one unit.

    Attributes:
        module, name: whose weight it is; the copy becomes an attribute in front of the parameter of that name.
        weight: the parameter.
        leaf: the copy; gradients of the unit's own use of the weight arrive here.
    """

    module: nn.Module
    name: str
    weight: nn.Parameter
    leaf: nn.Parameter

    @property
    def fits(self) -> bool:
        """Not where somebody has put another tensor or method (functional calls, surgery), or hooks on the gradient."""
        return (
            self.module._parameters.get(self.name) is self.weight
            and "forward" not in vars(self.module)
            and not self.weight._backward_hooks
        )


class CastWeights:
    """Copies of a stage's weights in autocast's type.

    Args:
        units: of the stage.
        dtype: autocast's; None: nothing is cast.
    """

    def __init__(self, units: Sequence[Unit], dtype: torch.dtype | None) -> None:
        self.units, self.dtype = units, dtype
        self._weights: list[Tensor] = []
        self._copies: list[Tensor] = []
        self._by_unit: list[list[_Copy]] | None = None
        self._seen: object = None

    @torch.no_grad()
    def refresh(self, updates: int, *, lasting: bool = True) -> None:
        """Casts the weights anew, unless they are what they were.

        Writes through ``weight.data`` are seen after the next update.

        Args:
            updates: how many there have been: a captured one is not counted as a modification of the weights.
            lasting: False: these weights are here for a while only.
        """
        if self._by_unit is None:
            self._make()
        if not self._weights:
            return
        now = (updates, [version_of(p) for p in self._weights], self._weights[0].device)
        if lasting and now == self._seen:
            return
        if self._copies[0].device != self._weights[0].device:
            self._make()
        torch._foreach_copy_(self._copies, self._weights)
        # While a CUDA graph is captured nothing is copied yet.
        captured = now[2].type == "cuda" and torch.cuda.is_current_stream_capturing()
        self._seen = now if lasting and not captured else None

    @contextmanager
    def standing_in(self, i: int) -> Iterator[None]:
        """Inside, the copies stand in for the weights of unit i."""
        copies = [copy for copy in self._of(i) if copy.fits]
        for copy in copies:
            vars(copy.module)[copy.name] = copy.leaf
        try:
            yield
        finally:
            for copy in copies:
                vars(copy.module).pop(copy.name, None)

    def stand_ins(self, i: int) -> tuple[list[nn.Parameter], list[Tensor]]:
        """Weights of unit i that want gradients, and the copies at which these arrive."""
        wanted = [copy for copy in self._of(i) if copy.leaf.requires_grad]
        return [copy.weight for copy in wanted], [copy.leaf for copy in wanted]

    def _of(self, i: int) -> list[_Copy]:
        return self._by_unit[i] if self._by_unit and i < len(self._by_unit) else []

    def _make(self) -> None:
        found: dict[int, tuple[nn.Parameter, Tensor]] = {}
        self._by_unit = []
        for unit in self.units:
            copies: list[_Copy] = []
            for module, name, weight in _cast_by_autocast(unit) if self.dtype else ():
                _, copy = found.setdefault(id(weight), (weight, torch.empty_like(weight.detach(), dtype=self.dtype)))
                # A leaf per unit, on the same memory: each unit's gradient of a shared weight arrives by itself.
                copies.append(_Copy(module, name, weight, nn.Parameter(copy.detach(), weight.requires_grad)))
            self._by_unit.append(copies)
        self._weights, self._copies = [p for p, _ in found.values()], [copy for _, copy in found.values()]


def _cast_by_autocast(unit: Unit) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """Where a unit's layers keep weights that autocast, and nobody else, reads."""
    for module in unit.modules():
        if type(module).forward not in _CAST or "forward" in vars(module) or module._forward_pre_hooks:
            continue
        for name, p in module._parameters.items():
            if p is not None and p.dtype == torch.float32 and not p.is_meta:
                yield module, name, p
