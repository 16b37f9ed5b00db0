"""Networks built without drawing their weights, where shapes and structure are all that is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from petra_zoo.models.layer_arguments import Argument

_DRAWING = (
    *(Tensor.normal_, Tensor.uniform_, Tensor.erfinv_, Tensor.clamp_, Tensor.mul_, Tensor.add_, Tensor.fill_),
    *(Tensor.zero_, Tensor.div_, Tensor.copy_),
    *(function for name, function in vars(nn.init).items() if name.endswith("_") and not name.startswith("_")),
)


class Unfilled(TorchFunctionMode):
    """Inside, nothing is written into parameters, which hold what their memory held; buffers are as ever.

    Initialising a network takes most of the time of building it, on the meta device as well, where drawing a truncated
    normal distribution runs through Python for every weight.
    """

    def __torch_function__(
        self,
        func: Callable[..., Argument],
        types: Iterable[type],
        args: tuple[Argument, ...] = (),
        kwargs: Mapping[str, Argument] | None = None,
    ) -> Argument:
        kwargs = kwargs or {}
        if func in _DRAWING:
            target = args[0] if args else kwargs.get("tensor")
            if isinstance(target, Tensor) and (target.is_meta or isinstance(target, nn.Parameter)):
                return target
        return func(*args, **kwargs)


def build_unfilled(create: Callable[[], nn.Module], device: str = "meta") -> nn.Module:
    """A network on a device, its parameters without values.

    Args:
        create: makes it.
        device: where; on the meta device buffers have no values either.
    """
    with torch.device(device), Unfilled():
        return create()
