"""Weights cast to autocast's type once per update, instead of in every evaluation of a unit.

Autocast casts the weight of a convolution or a linear layer each time the layer is called: twice per tick under PETRA,
in a kernel and an operation of its own. Here all weights of a stage are cast in one operation, into copies that stay
where they are. While a unit is evaluated its layers compute with the copies, each where autocast would have cast its
weights now: one that is called with autocast off keeps its own. Both round alike: the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from petra_zoo.reversible import Unit
from petra_zoo.reversible.compiled import compile_options
from petra_zoo.reversible.state import version_of

# Layers whose weights autocast casts as they are: others, such as timm's that standardise theirs, compute with them.
_CAST = {kind.forward for kind in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)}


class _Layer:
    """A layer of a unit, and copies of its weights.

    Args:
        module: the layer.
        dtype: of the copies.
        compilers: what it is part of that torch.compile may see: a compiled graph casts weights by itself.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype, compilers: Sequence[nn.Module]) -> None:
        self.module, self.dtype, self.compilers = module, dtype, compilers
        self.copies: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}  # by name: the weight, and where gradients come

    @property
    def fits(self) -> bool:
        """Not where somebody has put another tensor or method (functional calls, surgery), or hooks on the gradient."""
        if "forward" in vars(self.module) or any(map(_is_compiled, self.compilers)):
            return False
        return all(
            self.module._parameters.get(name) is weight and not weight._backward_hooks
            for name, (weight, _) in self.copies.items()
        )

    def __call__(self, input: Tensor) -> Tensor:
        """The layer's forward, while it stands in for it."""
        kind, own = input.device.type, vars(self.module)
        if not torch.is_autocast_enabled(kind) or torch.get_autocast_dtype(kind) != self.dtype:
            return self._forward(input)
        # As attributes, which come in front of the parameters of these names.
        own.update({name: leaf for name, (_, leaf) in self.copies.items()})
        try:
            return self._forward(input)
        finally:
            for name in self.copies:
                own.pop(name, None)

    def _forward(self, x: Tensor) -> Tensor:
        y: Tensor = type(self.module).forward(self.module, x)
        return y


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
        self._by_unit: list[list[_Layer]] | None = None
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
        """Inside, layers of unit i compute with the copies, where autocast would cast their weights."""
        layers = [layer for layer in self._of(i) if layer.fits]
        for layer in layers:
            vars(layer.module)["forward"] = layer
        try:
            yield
        finally:
            for layer in layers:
                vars(layer.module).pop("forward", None)

    def stand_ins(self, i: int) -> tuple[list[nn.Parameter], list[Tensor]]:
        """Weights of unit i that want gradients, and the copies at which these arrive."""
        pairs = [pair for layer in self._of(i) for pair in layer.copies.values()]
        wanted = [(weight, leaf) for weight, leaf in pairs if weight.requires_grad]
        return [weight for weight, _ in wanted], [leaf for _, leaf in wanted]

    def _of(self, i: int) -> list[_Layer]:
        return self._by_unit[i] if self._by_unit and i < len(self._by_unit) else []

    def _make(self) -> None:
        found: dict[int, tuple[nn.Parameter, Tensor]] = {}
        self._by_unit = []
        for unit in self.units:
            layers: dict[nn.Module, _Layer] = {}
            for module, name, weight in _cast_by_autocast(unit) if self.dtype else ():
                assert self.dtype
                _, copy = found.setdefault(id(weight), (weight, torch.empty_like(weight.detach(), dtype=self.dtype)))
                # A leaf per unit, on the same memory: each unit's gradient of a shared weight arrives by itself.
                leaf = nn.Parameter(copy.detach(), weight.requires_grad)
                if module not in layers:
                    around = [m for m in unit.modules() if any(module is part for part in m.modules())]
                    layers[module] = _Layer(module, self.dtype, around)
                layers[module].copies[name] = (weight, leaf)
            self._by_unit.append(list(layers.values()))
        self._weights, self._copies = [p for p, _ in found.values()], [copy for _, copy in found.values()]


def _is_compiled(m: nn.Module) -> bool:
    """Whether the branch of a block is, or a module by torch.compile itself."""
    return compile_options(m) is not None or "_orig_mod" in m._modules


def _cast_by_autocast(unit: Unit) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """Where a unit's layers keep weights that autocast, and nobody else, reads."""
    for module in unit.modules():
        if type(module).forward not in _CAST or "forward" in vars(module) or module._forward_pre_hooks:
            continue
        for name, p in module._parameters.items():
            if p is not None and p.dtype == torch.float32 and not p.is_meta:
                yield module, name, p


def precision(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[torch.autocast | None]:
    """Inside, branches compute under autocast to a type; None: as it was outside."""
    # Without its cache, which would outlive the weights that it has cast.
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype, cache_enabled=False)
