"""Links: how messages travel between neighbouring stages.

Both kinds have one interface. A message sent is received in the order of sending; the schedule (`clock.py`) says when.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import torch
from torch import Tensor

from petra_zoo.petra.messages import Down, Up

Direction = Literal["up", "down"]
Maybe = TypeVar("Maybe", Tensor, Tensor | None)
Message = TypeVar("Message", Up, Down)
Item = TypeVar("Item")


class LinkError(RuntimeError):
    """A message did not arrive; says which."""


@dataclass(frozen=True)
class Wire:
    """How messages travel between stages.

    Attributes:
        up: type of streams on their way up; None: as they are. They arrive in their own type.
        down: of streams and gradients on their way down.
        timeout: seconds that a message may take after the first tick.
    """

    up: torch.dtype | None = None
    down: torch.dtype | None = None
    timeout: float = 60.0

    def pack(self, x: Tensor, direction: Direction) -> Tensor:
        """x as it travels; whole numbers (labels, images of bytes) stay, and what is as narrow already.

        Streams in 16 bits may be bits of fixed-point numbers, which no other type could hold.
        """
        dtype = self.up if direction == "up" else self.down
        if dtype is None or not x.is_floating_point() or x.element_size() <= dtype.itemsize:
            return x
        return x.to(dtype)

    def rounded(self, tensors: tuple[Maybe, ...], direction: Direction) -> tuple[Maybe, ...]:
        """What arrives of tensors that are sent."""
        return tuple(None if x is None else self.pack(x, direction).to(x.dtype) for x in tensors)

    def arriving(self, message: Message) -> Message:
        """What arrives of a message."""
        if isinstance(message, Up):
            return replace(message, streams=self.rounded(message.streams, "up"))
        streams, gradients = self.rounded(message.streams, "down"), self.rounded(message.gradients, "down")
        return replace(message, streams=streams, gradients=gradients)


class Links:
    """Links between stages of one process: queues. `ProcessLinks` adds those that leave the process.

    Args:
        wire: applied here too, so that one process computes what many do.
    """

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.ups: defaultdict[int, deque[Up]] = defaultdict(deque)  # by receiving stage
        self.downs: defaultdict[int, deque[Down]] = defaultdict(deque)

    def expect(self, tick: int, ups: Iterable[int], downs: Iterable[int]) -> None:
        """Makes ready for the messages that these stages will receive in a tick."""

    def send_up(self, to: int, up: Up) -> None:
        """Sends a message to stage `to`."""
        self.ups[to].append(self.wire.arriving(up))

    def send_down(self, to: int, down: Down) -> None:
        """Sends a message to stage `to`."""
        self.downs[to].append(self.wire.arriving(down))

    def receive_up(self, stage: int, keep: bool = False) -> Up:
        """The oldest message for `stage`; `keep`: it will be looked at after this tick."""
        return self.ups[stage].popleft()

    def receive_down(self, stage: int) -> Down:
        """The oldest message for `stage`."""
        return self.downs[stage].popleft()

    def sent_by(self, stage: int) -> tuple[list[Up], list[Down]]:
        """Between two ticks: what a stage has sent in the last one, as it arrives."""
        return list(self.ups.get(stage + 1, ())), list(self.downs.get(stage - 1, ()))

    def resend_up(self, to: int, up: Up) -> None:
        """Before the first tick: what a stage had sent to stage `to` when it was saved."""
        self.ups[to].append(up)

    def resend_down(self, to: int, down: Down) -> None:
        """See `resend_up`."""
        self.downs[to].append(down)

    def awaited(self, items: Iterable[Item]) -> Iterable[Item]:
        """What will be fed, which may be long in coming: ranks that wait for it meanwhile are told that it will."""
        return items

    def begin_with(self, images: int) -> None:
        """Before the first tick: a full micro-batch has so many images, though the first to travel may be smaller."""

    def forget(self) -> None:
        """Drops all messages."""
        self.ups.clear()
        self.downs.clear()

    def finish(self) -> None:
        """Waits until everything sent is on its way, so that its memory may be used again."""
