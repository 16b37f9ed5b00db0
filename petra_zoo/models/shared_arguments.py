"""What every block of a chain takes beside its stream: masks, biases, rotary embeddings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

Given: TypeAlias = "Tensor | float | str | Sequence[Given] | Mapping[str, Given] | None"
Positional = tuple[Given, ...]
Named = dict[str, Given]
Arguments = Callable[[], tuple[Positional, Named]]


class SharedArguments(nn.Module):
    """The arguments of one call, as a module that units can have beside them (`Unit.outside`).

    Its tensors are buffers: so whoever goes backwards through a unit gives those their gradients that want some,
    sees the same objects again, and notices when one was modified in between.

    Args:
        positional: behind the stream.
        named: by keyword.
    """

    def __init__(self, positional: Positional, named: Named) -> None:
        super().__init__()
        self._leaves, self._structure = tree_flatten((positional, named))
        for i, leaf in enumerate(self._leaves):
            if isinstance(leaf, Tensor):
                self.register_buffer(str(i), leaf, persistent=False)
                self._leaves[i] = None

    def __call__(self) -> tuple[Positional, Named]:
        """The arguments, as they are now."""
        leaves = [self._buffers.get(str(i), leaf) for i, leaf in enumerate(self._leaves)]
        arguments: tuple[Positional, Named] = tree_unflatten(leaves, self._structure)
        return arguments


def called(shared: Callable[[], Positional]) -> Arguments:
    """Arguments that are computed where they are needed."""
    return lambda: (shared(), {})
