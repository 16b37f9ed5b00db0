"""When a module must run as plain operations, although it could save memory.

Tracers and exporters must see ordinary operations, module hooks must see tensors that carry gradients, and without a
backward pass there is nothing to save.
"""

from __future__ import annotations

import logging
from collections import OrderedDict

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrize

COMPILE_STORES = "torch.compile stores activations: a compiled model trains without reversible memory saving"
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_NO_TENSORS = frozenset((bool, int, float, str, tuple, list, dict, OrderedDict, set, type(None)))  # quick to rule out
_GLOBAL_HOOKS = tuple(f"_global{name}" for name in _HOOKS)


def needs_plain_path(module: nn.Module, x: object) -> bool:
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
        not isinstance(x, torch.Tensor)  # a torch.fx.Proxy
        or not torch.is_grad_enabled()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or parametrize._cache_enabled > 0  # a weight that the forward caches has no graph behind it
        or has_hooks(module)
        or has_loose_weights(module)
    )


def has_hooks(module: nn.Module) -> bool:
    """Whether a sub-module (not the module itself), or torch globally, carries a hook."""
    return any(getattr(torch_module, name) for name in _GLOBAL_HOOKS) or any(
        getattr(m, name) for m in module.modules() if m is not module for name in _HOOKS
    )


def has_loose_weights(module: nn.Module) -> bool:
    """Whether a tensor that wants gradients is a plain attribute: a hypernetwork's, a DataParallel replica's.

    A recomputation knows parameters and buffers alone.
    """
    for m in module.modules():
        for value in vars(m).values():
            if type(value) not in _NO_TENSORS and isinstance(value, torch.Tensor) and value.requires_grad:
                return True
    return False


@torch.compiler.assume_constant_result  # runs while torch.compile traces, so it is said once per compilation
def _say_that_compile_stores() -> bool:
    global _said
    if not _said:
        logging.getLogger("petra_zoo").warning(COMPILE_STORES)
        _said = True
    return True


_said = False
