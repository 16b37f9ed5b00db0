"""Which parts of a network may draw random numbers; only those need generators seeded, kept and replayed.

Known are the layers of torch and timm, by their classes, and this package's own blocks, which draw where a layer in
them does. What is not known may draw.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from types import FunctionType, MethodType

import torch.nn.functional as F
from torch import nn

from petra_zoo.reversible.operands import Operand

_KNOWN = ("torch.nn.modules.", "timm.layers.", "petra_zoo.")
_DRAWING_FILES = (  # of those known
    "torch.nn.modules.dropout",
    "torch.nn.modules.rnn",
    "torch.nn.modules.transformer",
    "timm.layers.diff_attention",
    "timm.layers.drop",
    "timm.layers.patch_dropout",
    "timm.layers.pos_embed_sincos",
)
_DRAWING = frozenset((nn.RReLU, nn.MultiheadAttention, nn.FractionalMaxPool2d, nn.FractionalMaxPool3d))
_KNOWN_FUNCTIONS = (F.relu, F.silu, F.gelu)


def may_draw(part: Callable[..., Operand]) -> bool:
    """Whether calling a part of a network may draw random numbers, in train mode or eval mode, at any rate of dropout.

    Args:
        part: a module; a method of one; a function; an object of this package whose fields are such parts.
    """
    if isinstance(part, nn.Module):
        return any(draws_itself(m) for m in part.modules())
    if isinstance(part, MethodType) and isinstance(part.__self__, nn.Module):
        return may_draw(part.__self__)
    if is_dataclass(part) and type(part).__module__.startswith("petra_zoo."):
        values = (getattr(part, field.name) for field in fields(part))
        return any(may_draw(value) for value in values if callable(value))
    if isinstance(part, FunctionType) and part.__module__.startswith("petra_zoo."):
        return part.__closure__ is not None  # else it has nothing to draw with
    return part not in _KNOWN_FUNCTIONS


def draws_itself(module: nn.Module) -> bool:
    """Whether a module may draw, apart from its sub-modules; a hook, or a method of its own, may do anything."""
    return (
        _class_may_draw(type(module))
        or bool(module._forward_hooks or module._forward_pre_hooks)
        or (not _is_unit(module) and any(map(callable, vars(module).values())))
    )


def _is_unit(module: nn.Module) -> bool:
    return type(module).__module__ == "petra_zoo.reversible.unit"  # they tell what they call: see `Unit.parts`


def _class_may_draw(kind: type[nn.Module]) -> bool:
    file = kind.__module__
    return not file.startswith(_KNOWN) or file.startswith(_DRAWING_FILES) or kind in _DRAWING
