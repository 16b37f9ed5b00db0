"""Who asks the device for a value, or moves one to or from it: what no CUDA graph can hold."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from petra_zoo.reversible.operands import Operand

# By the name of the operation: its result, or the result's shape, is read by the host.
_READS = {
    "aten::_local_scalar_dense": "reads a value",
    "aten::equal": "compares values",
    "aten::nonzero": "looks for values",
    "aten::masked_select": "selects by values",
    "aten::_unique2": "looks for equal values",
    "aten::unique_dim": "looks for equal values",
    "aten::repeat_interleave.Tensor": "repeats by values",
}


class HostReads(TorchDispatchMode):
    """Inside, every operation runs as ever; what the host reads is noted.

    Args:
        constants: tensors on the CPU that it may read: nothing that is queued changes them.

    Attributes:
        found: one line each, in order.
    """

    def __init__(self, constants: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.constants = {x.data_ptr() for x in constants if x.is_cpu}
        self.found: list[str] = []

    @classmethod
    def is_infra_mode(cls) -> bool:
        """It only looks: torch.compile need not make way, and what is compiled computes the bits that it ever does."""
        return True

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: Sequence[type],
        args: tuple[Operand, ...] = (),
        kwargs: dict[str, Operand] | None = None,
    ) -> Operand:
        result: Operand = func(*args, **(kwargs or {}))
        operands = [*args, *(kwargs or {}).values()]
        what = host_read(func, operands, result)
        if what and not all(x.data_ptr() in self.constants for x in tensors_in(operands)):
            self.found.append(what)
        return result


def host_read(func: torch._ops.OpOverload, operands: Sequence[Operand], result: Operand) -> str | None:
    """What the host reads in an operation, if anything."""
    name = func.name()
    if name in _READS:
        return f"{name} {_READS[name]}"
    devices = {x.device.type for x in tensors_in([*operands, result])} if "copy" in name else set()
    return f"{name} moves a tensor between {' and '.join(sorted(devices))}" if len(devices) > 1 else None


def tensors_in(operands: Sequence[Operand]) -> Iterator[Tensor]:
    """The tensors among an operation's operands, those in lists too."""
    for x in operands:
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, list | tuple):
            yield from tensors_in(x)
