"""Whether a tensor's value may be looked at, and what a buffer's was."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

# A coupling is a float or, where its value cannot be read (see `readable`), a 0-d tensor: then the general formula,
# which holds for any g. TorchScript knows the first alone.
if TYPE_CHECKING:
    Coupling = float | Tensor
else:
    Coupling = float


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


class BufferReading:
    """A 0-d buffer as a number; on a GPU read back only when its version tells that it changed.

    Copies and pickles know the number, and read the buffer anew.

    Args:
        value: the number, until a buffer is read.
        parse: from the buffer's value to the number.

    Attributes:
        value: the number as last known.
    """

    def __init__(self, value: float, parse: Callable[[float], float]) -> None:
        self.value, self._parse = value, parse
        self._buffer: weakref.ref[Tensor] | None = None
        self._version = -1

    def __reduce__(self) -> tuple[type[BufferReading], tuple[float, Callable[[float], float]]]:
        return type(self), (self.value, self._parse)

    def now(self, buffer: Tensor) -> float:
        """The buffer's number; on the meta device, the one last known."""
        if buffer.is_meta:
            return self.value
        if buffer.is_cpu or buffer.is_inference():  # reading costs nothing, or nobody counts
            self.value = self._parse(buffer.item())
        elif self._buffer is None or self._buffer() is not buffer or self._version != buffer._version:
            self.value = self._parse(buffer.item())
            self._buffer, self._version = weakref.ref(buffer), buffer._version
        return self.value

    def latest(self, buffer: Tensor) -> float:
        """`now`, or the number last known where the buffer cannot be read (see `readable`)."""
        return self.now(buffer) if readable(buffer) else self.value
