"""When a module must run as plain operations, although it could save memory.

Tracers and exporters must see ordinary operations, module hooks must see tensors that carry gradients, and without a
backward pass there is nothing to save.
"""

from __future__ import annotations

import logging
from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrize

COMPILE_STORES = (
    "torch.compile stores activations: a compiled model trains without reversible memory saving; "
    "model.compile_branches() compiles it and keeps the saving"
)
_NO_TENSORS = frozenset((bool, int, float, str, tuple, list, dict, OrderedDict, set, type(None)))  # quick to rule out
_GLOBAL_HOOKS = tuple(f"_global_{kind}_hooks" for kind in ("forward", "forward_pre", "backward", "backward_pre"))


def operations_are_wanted() -> bool:
    """Whether nobody goes backward, or somebody looks at operations now: a compiler, a tracer, a transform."""
    return (
        torch.compiler.is_compiling()
        or not torch.is_grad_enabled()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def needs_plain_path(module: nn.Module, x: Tensor | torch.fx.Proxy) -> bool:
    """Whether `module(x)` has to run as plain operations.

    True without gradients, under TorchScript, torch.fx, torch.export, torch.compile (which says so once), torch.func
    transforms, forward-mode differentiation and a cache of parametrizations, and when a sub-module carries a hook or
    wants a gradient for a tensor that is no parameter. Train or eval mode is the caller's to judge.
    """
    if torch.compiler.is_compiling():
        if not torch.compiler.is_exporting():
            _say_that_compile_stores()
        return True
    return (
        not isinstance(x, Tensor)
        or operations_are_wanted()
        or parametrize._cache_enabled > 0  # a weight that the forward caches has no graph behind it
        or any(getattr(torch_module, name) for name in _GLOBAL_HOOKS)
        or _has_hooks_or_loose_weights(module)
    )


def _has_hooks_or_loose_weights(module: nn.Module) -> bool:
    """Whether a sub-module carries a hook, or any module a tensor that wants gradients as a plain attribute.

    Such a tensor is a hypernetwork's, or a weight of a DataParallel replica: a recomputation knows parameters and
    buffers alone. Both may come and go between two calls, so every training forward looks, in this one pass.
    """
    for m in module.modules():
        if m is not module and carries_hook(m):
            return True
        values = vars(m).values()
        if not _NO_TENSORS.issuperset(map(type, values)):  # else done without a look at each
            loose = [name for name, value in vars(m).items() if isinstance(value, Tensor) and value.requires_grad]
            if loose:
                _say_that_it_is_stored(m, loose[0])
                return True
    return False


def carries_hook(m: nn.Module) -> bool:
    """Whether a module has a hook of its own that a call would run."""
    return bool(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks)


def _say_that_it_is_stored(m: nn.Module, name: str) -> None:
    """Says once for a class that nothing is saved, and why; of DataParallel's replicas everybody knows."""
    if vars(m).get("_is_replica") or (type(m), name) in _told:
        return
    _told.add((type(m), name))
    logging.getLogger("petra_zoo").warning(
        f"{type(m).__name__} holds a tensor with gradients in its attribute {name!r}, which no recomputation knows: "
        "activations are stored. A loss that a block adds should leave it as an output, or train with "
        "memory='plain' from the first step on"
    )


@torch.compiler.assume_constant_result  # runs while torch.compile traces, so it is said once per compilation
def _say_that_compile_stores() -> bool:
    global _said
    if not _said:
        logging.getLogger("petra_zoo").warning(COMPILE_STORES)
        _said = True
    return True


_said = False
_told = set[tuple[type[nn.Module], str]]()
