"""What a stage keeps between the forward and the backward of a micro-batch: first in, first out.

A `deque` holds the tensors themselves. A `Ring` holds copies at fixed addresses, as CUDA graphs need them: a replayed
tick writes where its number says, read from the device, and so one graph serves every tick.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from petra_zoo.reversible import Streams


class Fifo(Protocol):
    """Streams of micro-batches, oldest first."""

    def append(self, streams: Streams, /) -> None: ...

    def popleft(self) -> Streams: ...

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Streams]: ...


MakeFifo = Callable[[], Fifo]
Mark = tuple[list[tuple[int, ...]], int]  # where a ring is


def queue() -> Fifo:
    """A FIFO that holds the tensors themselves."""
    return deque[Streams]()


def filled(make: MakeFifo, entries: Iterable[Streams]) -> Fifo:
    """A FIFO that holds copies of these streams, oldest first."""
    fifo = make()
    for streams in entries:
        fifo.append(tuple(x.clone() for x in streams))
    return fifo


class Ring:
    """A FIFO in buffers that stay where they are: one per stream, [slots, B, ...] in the stream's memory order.

    A smaller micro-batch takes a part of its slot; a larger one, or another type, moves the ring to new buffers.

    Args:
        slots: how many micro-batches it can hold.

    Attributes:
        buffers: where the streams lie.
        places: the slots to write to and to read from, int64 [1] each on the device, while a tick is captured.
    """

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.places: tuple[Tensor, Tensor] | None = None
        self.buffers: list[Tensor] = []
        self._orders: list[tuple[int, ...]] = []
        self._sizes: deque[tuple[int, ...]] = deque()  # of each micro-batch, by stream; oldest first
        self._written = 0

    @property
    def inlet(self) -> int:
        """The slot that is written next."""
        return self._written % self.slots

    @property
    def outlet(self) -> int:
        """The slot that is read next."""
        return (self._written - len(self._sizes)) % self.slots

    def append(self, streams: Streams, /) -> None:
        """Copies the streams of a micro-batch into a slot.

        Raises:
            IndexError: there is none left.
        """
        if len(self._sizes) == self.slots:
            raise IndexError(f"all {self.slots} slots are taken")
        if not self._fits(streams):
            self._make_room(streams)
        for buffer, order, x in zip(self.buffers, self._orders, streams, strict=True):
            dense = x.permute(order)
            if self.places is None:
                buffer[self.inlet, : len(x)].copy_(dense)
            else:
                buffer.flatten(1).index_copy_(0, self.places[0], dense.reshape(1, -1))
        self._sizes.append(tuple(map(len, streams)))
        self._written += 1

    def popleft(self) -> Streams:
        """A copy of the oldest micro-batch's streams: its slot will be written again while they are still in use."""
        streams = tuple(map(self._read, range(len(self.buffers))))
        self._sizes.popleft()
        return streams

    def turn(self) -> None:
        """Takes note that a replayed tick has written a micro-batch like the newest and read the oldest."""
        self._sizes.append(self._sizes[-1])
        self._sizes.popleft()
        self._written += 1

    def mark(self) -> Mark:
        """Where it is, for `return_to`."""
        return list(self._sizes), self._written

    def return_to(self, mark: Mark) -> None:
        """Takes back what was counted since."""
        self._sizes, self._written = deque(mark[0]), mark[1]

    def __len__(self) -> int:
        return len(self._sizes)

    def __iter__(self) -> Iterator[Streams]:
        for age, sizes in enumerate(self._sizes):
            slot = (self.outlet + age) % self.slots
            yield tuple(self._view(n, slot, size) for n, size in enumerate(sizes))

    @property
    def images(self) -> list[int]:
        """How many images each micro-batch has, oldest first."""
        return [sizes[0] for sizes in self._sizes]

    def _read(self, n: int) -> Tensor:
        if self.places is None:
            return self._view(n, self.outlet, self._sizes[0][n]).clone()
        buffer, order = self.buffers[n], self._orders[n]
        taken = buffer.flatten(1).index_select(0, self.places[1])
        return taken.view(buffer.shape[1:]).permute(_inverse(order))

    def _view(self, n: int, slot: int, size: int) -> Tensor:
        return self.buffers[n][slot, :size].permute(_inverse(self._orders[n]))

    def _fits(self, streams: Streams) -> bool:
        if len(streams) != len(self.buffers):
            return False
        for buffer, order, x in zip(self.buffers, self._orders, streams, strict=True):
            shape = x.permute(order).shape
            if buffer.dtype != x.dtype or shape[1:] != buffer.shape[2:] or shape[0] > buffer.shape[1]:
                return False
        return True

    def _make_room(self, streams: Streams) -> None:
        """Moves to buffers for these streams, and what is there along with them."""
        held, outlet = [tuple(x.clone() for x in kept) for kept in self], self.outlet
        self._orders = [memory_order(x) for x in streams]
        self.buffers = [
            torch.empty((self.slots, *x.permute(order).shape), dtype=x.dtype, device=x.device)
            for order, x in zip(self._orders, streams, strict=True)
        ]
        for age, kept in enumerate(held):
            for n, x in enumerate(kept):
                self._view(n, (outlet + age) % self.slots, len(x)).copy_(x)


def memory_order(x: Tensor) -> tuple[int, ...]:
    """A tensor's dimensions from the outermost in memory to the innermost; the first is the batch.

    In this order a dense tensor is contiguous. One that is not, or whose batch lies further inside, is taken as it is.
    """
    order = tuple(sorted(range(x.ndim), key=lambda i: -x.stride()[i]))
    dense = x.permute(order).is_contiguous() and order[:1] == (0,)
    return order if dense else tuple(range(x.ndim))


def _inverse(order: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(order.index(i) for i in range(len(order)))
