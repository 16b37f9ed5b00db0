"""Live tensor bytes, counted: the same number on every run, on the CPU as on a GPU.

The resident set of a process cannot show the activations of small networks and saved-tensor hooks do not see what a
custom autograd Function keeps or recomputes. A dispatch mode sees every storage that comes to life, in the forward and
in the backward pass, and a weak reference tells when it dies.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages created inside the context and still alive.

    Args:
        apart: tensors (parameters, their gradients, buffers, a batch) that exist already and do not count.

    Attributes:
        now: live bytes at this moment.
        peak: the largest `now` so far.

    Example:
        >>> with LiveBytes() as memory:
        ...     model(images).sum().backward()
        >>> memory.peak
    """

    def __init__(self, apart: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._seen: dict[int, int] = {}  # storage address -> bytes; 0 for what does not count
        for x in apart:
            self._seen[x.untyped_storage()._cdata] = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for x in tree_iter((args, kwargs)):
            self._know(x, counts=False)
        out = func(*args, **(kwargs or {}))
        for x in tree_iter(out):
            self._know(x, counts=True)
        return out

    def _know(self, x: object, counts: bool) -> None:
        if not isinstance(x, Tensor) or x.device.type == "meta":
            return
        storage = x.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return
        size = storage.nbytes() if counts else 0
        self._seen[key] = size
        weakref.finalize(storage, self._forget, key)
        self.now += size
        self.peak = max(self.peak, self.now)

    def _forget(self, key: int) -> None:
        self.now -= self._seen.pop(key, 0)
