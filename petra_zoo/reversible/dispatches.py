"""How many operations a piece of work hands to torch: what the host does for it, the same number on every machine.

On a GPU most of them are a kernel each, and a small network's step costs what it takes to launch them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from petra_zoo.reversible.operands import Operand


class Dispatches(TorchDispatchMode):
    """Counts the operations that are dispatched inside, by name; those of backward passes too.

    Operations as torch's kernels see them: one for all tensors of a `_foreach_` function, and views count.

    Attributes:
        counts: by name, such as ``aten.convolution.default``.

    Example:
        >>> with Dispatches() as dispatches:
        ...     pipeline.step(images, labels)
        >>> dispatches.counts.most_common(5)
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    @property
    def total(self) -> int:
        """All of them."""
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
        return func(*args, **(kwargs or {}))
