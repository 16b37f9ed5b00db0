"""What a run of streams on a grid has seen of its range: noted on the device, read without waiting for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from petra_zoo.errors import UserError


class Ranges:
    """The largest values that streams were to take, in parts of their range: one number per device."""

    def __init__(self) -> None:
        self.seen: dict[torch.device, Tensor] = {}

    def take(self, part: Tensor) -> None:
        """Takes note of a value, 0-d."""
        seen = self.seen.get(part.device)
        if seen is None:
            self.seen[part.device] = part
        else:
            torch.maximum(seen, part, out=seen)

    def beyond(self) -> list[Tensor]:
        """Numbers, 0-d on their devices, that are finite where all values were in range; waits for nothing."""
        return [torch.where(part <= 1.0, part, torch.inf) for part in self.seen.values()]

    def forget(self) -> None:
        """As if nothing had been seen; the tensors stay: a captured graph goes on writing there."""
        for seen in self.seen.values():
            seen.zero_()


class _OnItsWay:
    """A number of a device, copied to the host while the host goes on."""

    def __init__(self, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self.value = torch.zeros((), pin_memory=on_gpu)
        self._event = torch.cuda.Event() if on_gpu else None

    @property
    def arrived(self) -> bool:
        """Whether `value` is there; before anything was sent it is, and is 0."""
        return self._event is None or self._event.query()

    def send(self, number: Tensor) -> None:
        self.value.copy_(number, non_blocking=True)
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(number.device))


class Saturation:
    """What the streams of a run on a grid have seen of its range, and the error where they went beyond.

    On the CPU a value beyond the range raises at once. A GPU's is noted there, and the note is copied to the host while
    the next ones are taken: the error comes about a step late, and nobody waits. `check` waits for it. Who reads notes
    by themselves, as stages of a pipeline do, have them taken `into` their own. Copies and pickles begin with nothing
    seen.

    Attributes:
        deferred: as on a GPU, wherever values are.
    """

    def __init__(self) -> None:
        self.deferred = False
        self._own = Ranges()
        self._into: Ranges | None = None
        self._on_their_way: dict[torch.device, _OnItsWay] = {}
        self._range = 0.0

    def __reduce__(self) -> tuple[type[Saturation], tuple[()]]:
        return type(self), ()

    @contextmanager
    def into(self, ranges: Ranges) -> Iterator[None]:
        """Inside, notes are taken there, and nothing is read or raised."""
        before, self._into = self._into, ranges
        try:
            yield
        finally:
            self._into = before

    def note(self, peak: Tensor, grid: float, most: float) -> None:
        """Takes note of values before they are clamped.

        Args:
            peak: the largest absolute value, 0-d, in steps of the grid.
            grid: the step.
            most: how many there may be.

        Raises:
            UserError: it is beyond the range, or not a number; on a GPU: an earlier one was.
        """
        if peak.is_meta:
            return
        self._range = grid * most
        if self._into is not None:
            self._into.take(peak.detach().float() / most)
        elif peak.is_cpu and not self.deferred:
            self._judge(peak.item() / most)
        else:
            self._own.take(peak.detach().float() / most)
            self.look()

    def look(self) -> None:
        """Judges what has arrived of a GPU's notes, and sends for newer ones; waits for nothing.

        Raises:
            UserError: a value was beyond the range, or not a number.
        """
        for device, seen in self._own.seen.items():
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                continue  # a graph that is replayed runs no Python: who replays it looks
            sent = self._on_their_way.setdefault(device, _OnItsWay(device))
            if sent.arrived:
                with _disable_current_modes():  # no operation of the network's, and no read that waits
                    part = sent.value.item()
                    if not part <= 1.0:  # said once
                        seen.zero_()
                    sent.send(seen)
                self._judge(part)

    def check(self) -> None:
        """Reads what was noted, and forgets it: waits for the device.

        Raises:
            UserError: a value was beyond the range, or not a number.
        """
        parts = [seen.item() for seen in self._own.seen.values()]
        self._own.forget()
        self._on_their_way.clear()
        for part in parts:
            self._judge(part)

    def _judge(self, part: float) -> None:
        if not part <= 1.0:
            raise UserError(
                f"exact inversion needs |stream| < {self._range:g}, found {part * self._range:g}: use a coarser grid "
                "(exact=True: a smaller exact_bits; streams='fixed16': choose_grids), or float32 streams without exact"
            )


def saturations_in(module: nn.Module) -> list[Saturation]:
    """Those that a module and its sub-modules keep."""
    return [x for m in module.modules() for x in vars(m).values() if isinstance(x, Saturation)]
