"""Batch norms over all replicas of a pipeline: torch's and timm's synchronised ones, fit to be copied."""

from __future__ import annotations

from functools import cache
from typing import Any, Self

import torch
from timm.layers import convert_sync_batchnorm
from torch import nn
from torch.distributed import ProcessGroup
from torch.nn import SyncBatchNorm
from torch.nn.modules.batchnorm import _BatchNorm

from petra_zoo.errors import UserError
from petra_zoo.petra import World
from petra_zoo.training.finetuning import is_frozen_norm

_State = dict[str, Any]  # what pickle and copy hand over: a module's attributes


def synchronize_statistics(model: nn.Module, world: World) -> None:
    """Turns batch norms into synchronised ones, over the replicas of each rank, in place.

    Frozen ones use their running statistics, which need no other replica: they stay as they are.

    Raises:
        UserError: not on CUDA, where torch has none.
    """
    require_cuda(world.device)
    for parent in list(model.modules()):
        for name, norm in list(parent.named_children()):
            if not isinstance(norm, _BatchNorm) or is_frozen_norm(norm):
                continue
            synchronized: nn.Module = convert_sync_batchnorm(norm, world.across)  # timm's keeps an activation inside
            # mypy looks for a class's hash in its instances.
            synchronized.__class__ = _copied_with_its_group(type(synchronized))  # type: ignore[arg-type]
            parent.add_module(name, synchronized)


def require_cuda(device: torch.device) -> None:
    """Refuses a device on which torch cannot synchronise batch norms.

    Raises:
        UserError: it is none of CUDA's.
    """
    if device.type != "cuda":
        raise UserError("sync_bn=true: torch synchronises batch norms on CUDA only; leave it out, or use group norm")


class _Shared:
    """A value that all copies have in common."""

    def __init__(self, value: ProcessGroup | None) -> None:
        self.value = value

    def __deepcopy__(self, memo: dict[int, nn.Module]) -> Self:
        return self


@cache
def _copied_with_its_group(kind: type[nn.Module]) -> type[nn.Module]:
    """The class, but its copies belong to the same process group, which itself cannot be copied."""

    def __getstate__(self: SyncBatchNorm) -> _State:
        return {**self.__dict__, "process_group": _Shared(self.process_group)}

    def __setstate__(self: SyncBatchNorm, state: _State) -> None:
        kind.__setstate__(self, {**state, "process_group": state["process_group"].value})

    return type(f"Replica{kind.__name__}", (kind,), {"__getstate__": __getstate__, "__setstate__": __setstate__})
