"""Whether a tensor's value may be looked at."""

from __future__ import annotations

import torch
from torch import Tensor


def readable(x: Tensor) -> bool:
    """Whether the value of x can be read now, and stays what a later run of the same operations would find.

    False while a graph is recorded that will run again (compiled, exported, traced), in torch.func's transforms, whose
    tensors stand for many, for tensor subclasses, and on the meta device.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    return (
        type(x) in (Tensor, torch.nn.Parameter)
        and not x.is_meta
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
    )
