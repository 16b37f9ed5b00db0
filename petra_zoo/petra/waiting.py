"""Waiting for other processes, and what is said when it was in vain."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, Work

from petra_zoo.petra.links import LinkError

_EVERY = 0.0002  # seconds between two looks at a device


def wait_for(work: Work | None, timeout: timedelta | None, what: str) -> None:
    """Waits for a send or a receive.

    Args:
        work: that.
        timeout: None: lets the device's work wait, and not the host (NCCL).
        what: it was, in words.

    Raises:
        LinkError: it did not end in time, or the other rank has gone; says what it was.
    """
    assert work is not None, "only members of a group send and receive in it"
    try:
        work.wait(timeout) if timeout else work.wait()
    except RuntimeError as error:
        reason = str(error)
        how = (
            f"nothing within {timeout.total_seconds():g} s"
            if timeout and "imed out" in reason
            else "that rank has gone"
        )
        raise LinkError(f"{what}: {how} ({reason.strip().splitlines()[0][:160]})") from error


class Mark(Protocol):
    """A place in a device's queue of work, such as a CUDA event."""

    def query(self) -> bool:
        """Whether the device has passed it."""


class OneBehind:
    """Holds the host back until the device has passed the place where it stood the last time.

    Where waiting orders the device's work and holds up nobody (NCCL), a message that never comes would stop the device
    while the host runs on, and nobody would say which one it was.

    Args:
        record: marks the place where the device's queue ends now.
    """

    def __init__(self, record: Callable[[], Mark]) -> None:
        self._record = record
        self._last: tuple[Mark, str] | None = None

    def follow(self, timeout: timedelta, what: str) -> None:
        """Waits for the last place, and marks this one.

        Args:
            timeout: for the last one.
            what: the device waits for here, in words.

        Raises:
            LinkError: the device has not got to the last one; says what it waits for there.
        """
        if self._last is not None:
            (mark, waits_for), end = self._last, time.monotonic() + timeout.total_seconds()
            while not mark.query():
                if time.monotonic() > end:
                    raise LinkError(f"{waits_for}: the device has not got it within {timeout.total_seconds():g} s")
                time.sleep(_EVERY)
        self._last = self._record(), what


def recorded_event() -> Mark:
    """Behind what the current stream of the current CUDA device has to do."""
    event = torch.cuda.Event()
    event.record()
    return event


def reduce_within(
    timeout: timedelta,
    x: Tensor,
    group: ProcessGroup,
    what: str,
    operation: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM,
) -> None:
    """Reduces a tensor over a group, in place.

    Raises:
        LinkError: a process has gone, or is silent for longer than the timeout (where NCCL does not watch over it).
    """
    wait_for(dist.all_reduce(x, operation, group=group, async_op=True), None if x.is_cuda else timeout, what)
