"""What a piece of work is on a GPU, counted where there is none: operations, and the bytes that they read and write.

A convolutional network's step is bound by memory: each operation reads its arguments and writes its results once, and a
batch norm reads twice what it takes statistics of. Counted on the meta device, where nothing is computed, if need be.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_iter

from petra_zoo.reversible import Dispatches
from petra_zoo.reversible.fused import Results, counted_by
from petra_zoo.reversible.operands import Operand

_WRITES_ALONE = ("aten.zero", "aten.fill", "aten.new_zeros", "aten.ones", "aten.copy_")  # not what is written over


class Kernels(Dispatches):
    """Counts operations as a GPU has them, those of backward passes too: a `Fused` function is one.

    Attributes:
        moved: bytes read and written.
    """

    def __init__(self) -> None:
        super().__init__()
        self.moved = 0

    def __enter__(self) -> Self:
        self._inside = ExitStack()
        self._inside.enter_context(counted_by(self._fused))
        super().__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)
        self._inside.close()

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: Sequence[type],
        args: tuple[Operand, ...] = (),
        kwargs: dict[str, Operand] | None = None,
    ) -> Operand:
        before = self.operations
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if self.operations > before:
            name = str(func)
            read, written = _bytes_of((args, kwargs)), _bytes_of(out)
            if name.startswith(_WRITES_ALONE):
                read -= min(read, written)
            if "batch_norm" in name:  # of the activations: its other arguments are a number for each channel
                read *= 2
            self.moved += read + written
        return out

    def _fused(self, tensors: tuple[Tensor, ...], call: Callable[[], Results]) -> Results:
        with _disable_current_modes():
            results = call()
        self.operations += 1
        self.moved += _bytes_of(tensors) + _bytes_of(results)
        return results


def _bytes_of(operands: object) -> int:
    """Of every tensor once, however often it is named."""
    return sum({id(x): x.nbytes for x in tree_iter(operands) if isinstance(x, Tensor)}.values())
