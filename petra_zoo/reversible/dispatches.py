"""How many operations a piece of work hands to torch: what the host does for it, the same number on every machine.

On a GPU most of them are a kernel each, and a small network's step costs what it takes to launch them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from petra_zoo.reversible.operands import Operand

# They compute nothing: on a GPU no kernel is launched. (What the host reads there is counted where it matters, by
# `torch.cuda.set_sync_debug_mode`.)
_FREE = ("aten.empty", "aten.new_empty", "aten._local_scalar_dense")


class Dispatches(TorchDispatchMode):
    """Counts the operations that are dispatched inside, by name; those of backward passes too.

    Operations as torch's kernels see them: one for all tensors of a `_foreach_` function.

    Attributes:
        counts: by name, such as ``aten.convolution.default``; all of them.
        operations: how many compute something: no views, no empty tensors, no values that the host reads.

    Example:
        >>> with Dispatches() as dispatches:
        ...     pipeline.step(images, labels)
        >>> dispatches.counts.most_common(5)
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.operations = 0

    @property
    def total(self) -> int:
        """All that were dispatched."""
        return self.counts.total()

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: Sequence[type],
        args: tuple[Operand, ...] = (),
        kwargs: dict[str, Operand] | None = None,
    ) -> Operand:
        if func.namespace != "profiler":  # marks in a trace, which do nothing
            self.counts[str(func)] += 1
            self.operations += not (func.is_view or str(func).startswith(_FREE))
        return func(*args, **(kwargs or {}))
