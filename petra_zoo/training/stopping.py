"""Stopping in between: a signal, or the time that a batch queue gives, ends a run behind a tick, saved.

Every process may be told, and all have to stop behind the same tick. So each says after every tick whether it was told,
in a reduction that nobody waits for before some ticks have passed: then all know the same, and decide alike.
"""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, Work

from petra_zoo.errors import UserError
from petra_zoo.petra import World
from petra_zoo.petra.waiting import wait_for

STOPPED = 75  # exit code: EX_TEMPFAIL of sysexits.h, to be tried again
_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]


class RunStopped(KeyboardInterrupt):
    """A run was told to stop, and has saved what it needs to go on.

    It is a KeyboardInterrupt, whatever the signal: what called the run is to end as well.

    Attributes:
        path: the run directory.
    """

    def __init__(self, why: str, path: Path) -> None:
        super().__init__(f"stopped by {why}: {path} is saved; the same command goes on from there")
        self.path = path


class Told:
    """Whether this process was told to stop, and by what.

    Attributes:
        by: the signal's name.
        saves: whether there is something to save: before, a signal ends the process as ever.
    """

    def __init__(self) -> None:
        self.by: str | None = None
        self.saves = False


@contextmanager
def listening() -> Iterator[Told]:
    """Inside, a first SIGTERM, SIGINT or SIGUSR1 is taken note of; a second one ends the process at once."""
    told, own = Told(), os.getpid()

    def hear(number: int, frame: FrameType | None) -> None:
        if os.getpid() != own:  # a loader's worker: whoever started it ends it
            return
        if number == signal.SIGINT and not told.saves:
            raise KeyboardInterrupt
        if told.by is not None or not told.saves:
            os._exit(128 + number)
        told.by = signal.Signals(number).name
        with suppress(OSError):  # nobody may be reading any more; no print(), which may be interrupted itself
            os.write(2, f"petra-zoo: {told.by}: saving behind this tick\n".encode())

    if threading.current_thread() is not threading.main_thread():  # only there may signals be handled
        yield told
        return
    before = {number: signal.signal(number, hear) for number in _SIGNALS}
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


class Word(NamedTuple):
    """What processes tell each other after a tick.

    Attributes:
        stop: whether to stop; `save`: whether it is time to save.
        failed: whether something was not finite.
        skipped: micro-batches left out so far, for they were not.
    """

    stop: bool = False
    save: bool = False
    failed: bool = False
    skipped: int = 0

    def or_said(self, other: Word) -> Word:
        """What is said by either."""
        return Word(
            self.stop or other.stop,
            self.save or other.save,
            self.failed or other.failed,
            max(self.skipped, other.skipped),
        )


class Agreement:
    """What any process says, all of them hear behind the same tick.

    Args:
        world: this process's place.

    Attributes:
        world: the same, with gatherings in which nobody may be silent for longer than its patience.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        # As late as a message from the farthest rank may be anyway: nobody waits for it in a steady pipeline.
        self.late = world.size
        self._said: deque[tuple[Tensor, Work]] = deque()
        self._group: ProcessGroup | None = None
        if not world.alone:
            self._group, meeting = (_new_group(world.patience) for _ in range(2))
            self.world = replace(world, meeting=meeting)

    def exchange(self, word: Word) -> Word:
        """Says something after a tick and gives what was said by anybody some ticks ago.

        Raises:
            LinkError: another process has gone, or is silent for longer than `World.patience`.
        """
        if self._group is None:
            return word
        flags = torch.tensor(word, dtype=torch.int32)
        work = dist.all_reduce(flags, dist.ReduceOp.MAX, group=self._group, async_op=True)
        assert work is not None
        self._said.append((flags, work))
        return self._hear() if len(self._said) > self.late else Word()

    def settle(self) -> Word:
        """Everything that was said and not heard yet: before processes do something else together."""
        word = Word()
        while self._said:
            word = word.or_said(self._hear())
        return word

    def _hear(self) -> Word:
        flags, work = self._said.popleft()
        wait_for(work, self.world.patience, "this rank waits for the others to end a tick")
        stop, save, failed, skipped = flags.tolist()
        return Word(bool(stop), bool(save), bool(failed), skipped)


def _new_group(timeout: timedelta) -> ProcessGroup:
    """Of all processes, on the CPU."""
    group = dist.new_group(backend="gloo", timeout=timeout)
    assert isinstance(group, ProcessGroup)
    return group


class Deadline:
    """The time that a run may take.

    Args:
        seconds: from now on; None: any.
    """

    def __init__(self, seconds: float | None) -> None:
        self.end = None if seconds is None else time.monotonic() + seconds

    @property
    def passed(self) -> bool:
        """Whether it is over."""
        return self.end is not None and time.monotonic() >= self.end


def parse_duration(duration: str) -> float:
    """Of such as ``1h30m``, ``45m`` or ``90s``.

    Raises:
        UserError: it is no duration.
    """
    found = re.fullmatch(r"(?:([0-9]+)h)?(?:([0-9]+)m)?(?:([0-9]+)s)?", duration)
    if not duration or not found:
        raise UserError(f"{duration!r} is no time: expected such as 1h30m, 45m or 90s")
    hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return 3600.0 * hours + 60.0 * minutes + seconds
