"""A pipeline in virtual time: ranks are threads that run the real links and the real tick, with clocks of their own.

Stages take seconds instead of computing. A body travels once both ends have asked for it and what was asked for before
it, in the same queue, has arrived; waiting for it sets a rank's clock forward. So the order in which the links post
and wait is what is measured, and nothing else is.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from types import SimpleNamespace

import torch
from torch import Tensor

from petra_zoo.petra import Pipeline, World
from petra_zoo.petra.channels import BODY, Channels
from petra_zoo.petra.clock import Clock
from petra_zoo.petra.messages import Down, Up
from petra_zoo.petra.process_links import ProcessLinks
from petra_zoo.petra.tick import run_tick

_LOCK = threading.RLock()
LONGEST = 60.0  # real seconds that a rank may wait


@dataclass
class Transfer:
    """A part of a message, from when one end has asked for it.

    Attributes:
        seconds: on its way.
        begins: when it may begin, as far as is known.
        needs: ends that have not asked yet, and transfers in front of it that have not arrived.
    """

    seconds: float
    begins: float = 0.0
    needs: int = 2
    arrived: float | None = None
    behind: list[Transfer] = field(default_factory=list)
    event: threading.Event = field(default_factory=threading.Event)
    data: Tensor | None = None
    into: Tensor | None = None

    def met(self, time: float) -> None:
        """One of its needs is there since then."""
        self.begins, self.needs = max(self.begins, time), self.needs - 1
        if self.needs:
            return
        self.arrived = self.begins + self.seconds
        assert self.data is not None
        assert self.into is not None
        self.into.copy_(self.data)
        self.event.set()
        for other in self.behind:
            other.met(self.arrived)


class Queue:
    """What is done in order: NCCL's group, of which each rank has its own view."""

    def __init__(self) -> None:
        self._last: Transfer | None = None

    def put(self, transfer: Transfer) -> None:
        if self._last is not None and self._last is not transfer and self._last.arrived is None:
            transfer.needs += 1
            self._last.behind.append(transfer)
        elif self._last is not None and self._last.arrived is not None:
            transfer.begins = max(transfer.begins, self._last.arrived)
        self._last = transfer


class Rank:
    """A rank's clock."""

    def __init__(self) -> None:
        self.now = 0.0


class Way:
    """One direction between two ranks: transfers that one end has asked for, by part."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.asked: dict[tuple[bool, int], deque[Transfer]] = {}

    def transfer(self, sends: bool, part: int) -> Transfer:
        """The next one of a part, of which this end is the first or the second to ask."""
        if waiting := self.asked.setdefault((not sends, part), deque()):
            return waiting.popleft()
        transfer = Transfer(self.seconds if part == BODY else 0.0)
        self.asked.setdefault((sends, part), deque()).append(transfer)
        return transfer


@dataclass(frozen=True)
class VirtualWork:
    rank: Rank
    transfer: Transfer

    def wait(self, timeout: timedelta | None = None) -> bool:
        if not self.transfer.event.wait(LONGEST):
            raise RuntimeError("a deadlock")
        assert self.transfer.arrived is not None
        self.rank.now = max(self.rank.now, self.transfer.arrived)
        return True


@dataclass(frozen=True)
class VirtualChannel:
    """One end of a way."""

    rank: Rank
    way: Way
    queue: Queue
    peer: int
    timed: bool = True

    def isend(self, x: Tensor, part: int) -> VirtualWork:
        return self._ask(x.clone(), part, sends=True)

    def irecv(self, x: Tensor, part: int) -> VirtualWork:
        return self._ask(x, part, sends=False)

    def _ask(self, x: Tensor, part: int, sends: bool) -> VirtualWork:
        with _LOCK:
            transfer = self.way.transfer(sends, part)
            if part == BODY:
                self.queue.put(transfer)
            if sends:
                transfer.data = x
            else:
                transfer.into = x
            transfer.met(self.rank.now)
        return VirtualWork(self.rank, transfer)


class TimedStage:
    """A stage that takes seconds."""

    keeps_received, sends_gradients = False, True

    def __init__(self, rank: Rank, index: int, last: bool, forward: float, backward: float) -> None:
        self.rank, self.index, self.last = rank, index, last
        self._forward, self._backward = forward, backward
        self.gate = SimpleNamespace(forward=_nothing)
        self.sends_gradients = index > 0

    def forward(self, up: Up) -> Up:
        self.rank.now += self._forward
        return Up(up.micro_batch, (torch.zeros(1, 1),), up.labels)

    def backward(self, down: Down) -> Down:
        self.rank.now += self._backward
        return Down(down.micro_batch, (), (torch.zeros(1, 1),))

    def forward_backward(self, up: Up) -> tuple[Down, Tensor, Tensor]:
        self.rank.now += self._forward + self._backward
        return Down(up.micro_batch, (), (torch.zeros(1, 1),)), torch.zeros(()), torch.zeros(1, 1)

    def update(self) -> None:
        pass


def _nothing() -> AbstractContextManager[None]:
    return nullcontext()


def run_ticks(
    forward: Sequence[float],
    backward: Sequence[float],
    up: Sequence[float],
    down: Sequence[float],
    ticks: int,
    one_queue: bool = False,
) -> list[float]:
    """When the first rank's ticks end.

    Args:
        forward, backward: seconds of each stage, one to a rank.
        up, down: seconds of a message over each link.
        ticks: how many.
        one_queue: whether all messages of a direction are in one group.
    """
    size = len(forward)
    ranks = [Rank() for _ in range(size)]
    ways = {"up": [Way(seconds) for seconds in up], "down": [Way(seconds) for seconds in down]}
    shared = [{"up": Queue(), "down": Queue()} for _ in range(size)]
    ends: list[float] = []
    errors: list[BaseException] = []

    def end(rank: int, link: int, direction: str, peer: int) -> VirtualChannel | None:
        if not 0 <= link < size - 1:
            return None
        queue = shared[rank][direction] if one_queue else Queue()
        return VirtualChannel(ranks[rank], ways[direction][link], queue, peer)

    def live(r: int) -> None:
        channels = Channels(
            from_below=end(r, r - 1, "up", r - 1),
            to_above=end(r, r, "up", r + 1),
            from_above=end(r, r, "down", r + 1),
            to_below=end(r, r - 1, "down", r - 1),
        )
        links = ProcessLinks(World(rank=r, size=size, peers=tuple(range(size)), channels=channels), range(r, r + 1))
        stage, clock = TimedStage(ranks[r], r, r == size - 1, forward[r], backward[r]), Clock(size, delayed=True)
        pipeline = SimpleNamespace(links=links, stages=[stage], clock=clock)
        for number in range(ticks):
            clock.next_tick(True)
            Pipeline._expect(pipeline, clock.tick + 1)  # type: ignore[arg-type]
            fed = Up(number, (torch.zeros(1, 1),), torch.zeros(1)) if r == 0 else None
            run_tick([stage], links, clock, fed)  # type: ignore[list-item]
            if r == 0:
                ends.append(ranks[0].now)

    def guarded(r: int) -> None:
        try:
            live(r)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(r,), daemon=True) for r in range(size)]
    for thread in threads:
        thread.start()
    threads[0].join(LONGEST * 10)
    if errors:
        raise errors[0]
    return ends


def long_run(ends: Sequence[float], over: int) -> float:
    """Seconds of a tick: the mean of the last ones."""
    return (ends[-1] - ends[-1 - over]) / over
