"""Live tensor bytes, counted: the same number on every run, on the CPU as on a GPU and on the meta device.

The resident set of a process cannot show the activations of small networks and saved-tensor hooks do not see what a
custom autograd Function keeps or recomputes. A dispatch mode sees every storage that comes to life, in the forward and
in the backward pass, and a weak reference tells when it dies. On the meta device nothing is computed: a step of any
batch takes as long as its dispatches, and sizes are those of the real thing, the workspace inside a kernel apart.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import TypeGuard

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from petra_zoo.reversible.operands import Operand
from petra_zoo.reversible.shape_memo import ShapeMemo


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages created inside the context and still alive.

    Args:
        apart: tensors (parameters, their gradients, buffers, a batch) that exist already and do not count.

    Attributes:
        now: live bytes after the last operation.
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
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}  # by the storage's address
        self._meta: dict[int, int] = {}  # bytes of those without content, whose size nobody changes
        self._meta_bytes = 0  # their sum: a step on the meta device makes thousands
        self._apart: set[int] = set()
        self._memo = ShapeMemo()
        for x in apart:
            self._set_apart(x.untyped_storage())

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: Sequence[type],
        args: tuple[Operand, ...] = (),
        kwargs: dict[str, Operand] | None = None,
    ) -> object:
        for x in tree_iter((args, kwargs)):
            if _is_tensor(x):
                self._set_apart(x.untyped_storage())  # unless made inside: a batch, a parameter
        out = self._memo.call(func, args, kwargs or {})
        for x in tree_iter(out):
            if _is_tensor(x):
                self._watch(x.untyped_storage())
        # Summed anew each time: some libraries free memory by resizing a storage, which no dispatcher sees.
        self.now = self._meta_bytes
        self.now += sum(storage.nbytes() for ref in self._alive.values() if (storage := ref()) is not None)
        self.peak = max(self.peak, self.now)
        return out

    def _set_apart(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if self._knows(key):
            return
        self._apart.add(key)
        weakref.finalize(storage, self._apart.discard, key)

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if self._knows(key):
            return
        if storage.device.type == "meta":
            self._meta[key] = storage.nbytes()
            self._meta_bytes += storage.nbytes()
            weakref.finalize(storage, self._forget_meta, key)
        else:
            self._alive[key] = weakref.ref(storage)
            weakref.finalize(storage, self._alive.pop, key, None)

    def _knows(self, key: int) -> bool:
        return key in self._alive or key in self._meta or key in self._apart

    def _forget_meta(self, key: int) -> None:
        self._meta_bytes -= self._meta.pop(key)


def _is_tensor(x: Operand) -> TypeGuard[Tensor]:
    return isinstance(x, Tensor)
