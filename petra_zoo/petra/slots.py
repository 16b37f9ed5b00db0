"""Memory for the messages under way at one end of a link, used in turn.

On a GPU the host runs ahead of the device: that a slot has been handed out again says nothing about whether the device
has read what was in it. An event per slot does.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


class Slots:
    """Slots of equal size, each taken again when all others have been.

    Args:
        nbytes: of a slot.
        count: how many; one more on a GPU, so that the slot received into is not the one that the device has just read.
        device: where the rank computes.
        staged: whether messages wait in pinned memory of the host on their way to and from a GPU.
    """

    def __init__(self, nbytes: int, count: int, device: torch.device, staged: bool) -> None:
        on_gpu = device.type == "cuda"
        self.device, self.staged = device, staged
        place = torch.device("cpu") if staged else device
        self.memory = [
            torch.empty(nbytes, dtype=torch.uint8, device=place, pin_memory=staged) for _ in range(count + on_gpu)
        ]
        self._stream = torch.cuda.Stream(device) if on_gpu else None
        self._read = [torch.cuda.Event() for _ in self.memory] if on_gpu else []
        self._taken = 0  # so far

    def take(self) -> Tensor:
        """The next slot."""
        self._taken += 1
        return self.memory[(self._taken - 1) % len(self.memory)]

    def receiving(self, slot: Tensor) -> AbstractContextManager[object]:
        """Around a receive into a slot: it waits until the device has read the slot, and for nothing else."""
        if self._stream is None:
            return nullcontext()
        event = self._read[self._index(slot)]
        if self.staged:
            event.synchronize()
            return nullcontext()
        self._stream.wait_event(event)
        return torch.cuda.stream(self._stream)

    def on_device(self, x: Tensor) -> Tensor:
        """A received tensor where the rank computes; the copy waits for nothing that the rank has queued before."""
        if self._stream is None or not self.staged:
            return x
        with torch.cuda.stream(self._stream):
            copied = x.to(self.device, non_blocking=True)
        now = torch.cuda.current_stream(self.device)
        now.wait_stream(self._stream)
        copied.record_stream(now)
        return copied

    def has_been_read(self, slot: Tensor) -> None:
        """What the device has queued so far is all that reads a slot."""
        if self._stream is not None:
            self._read[self._index(slot)].record(self._stream if self.staged else None)

    def _index(self, slot: Tensor) -> int:
        return next(i for i, memory in enumerate(self.memory) if memory is slot)
