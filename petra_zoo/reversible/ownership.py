"""Whose memory a tensor is: what going backwards may write over, and what somebody else will read.

A coupled block needs its streams and their gradients once on the way back, and gives as many of the same size. Written
over each other they take no further memory; but only tensors that nobody else holds may be written over.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor


def storage_of(x: Tensor) -> int:
    """Names the memory behind x, on every device, for as long as x lives."""
    return x.untyped_storage()._cdata


def apart(gradients: Iterable[Tensor | None], others: Iterable[Tensor | None]) -> tuple[Tensor | None, ...]:
    """The gradients, such that no two of them share memory, and none with any of the others.

    Autograd hands a gradient on as it is where it can: to the input of an identity, to both terms of a sum.
    """
    taken = {storage_of(x) for x in others if x is not None}
    found: list[Tensor | None] = []
    for d in gradients:
        if d is not None:
            if storage_of(d) in taken:
                d = d.clone()
            taken.add(storage_of(d))
        found.append(d)
    return tuple(found)


class Lent:
    """Memory that somebody else will read, the caller or a later step.

    Args:
        tensors: that lie in it.
        storages: more of it, by name (`storage_of`).
    """

    def __init__(self, tensors: Iterable[Tensor | None], storages: Iterable[int] = ()) -> None:
        self._storages = set(storages)
        self.lend(tensors)

    def lend(self, tensors: Iterable[Tensor | None]) -> None:
        """Adds the memory of more tensors."""
        self._storages.update(storage_of(x) for x in tensors if x is not None)

    def none_of(self, tensors: Iterable[Tensor | None]) -> bool:
        """Whether all of the tensors may be written over: each has memory of its own, for every element."""
        given = [x for x in tensors if x is not None]
        storages = {storage_of(x) for x in given}
        if len(storages) < len(given) or not self._storages.isdisjoint(storages):
            return False
        return all(x.nbytes <= x.untyped_storage().nbytes() for x in given)  # else expanded: one element, many places

    def returned(self, gradients: Iterable[Tensor | None]) -> tuple[Tensor | None, ...]:
        """The gradients, copied where they lie in lent memory or in one another's."""
        return tuple(d if d is None or self.none_of([d]) else d.clone() for d in apart(gradients, ()))
