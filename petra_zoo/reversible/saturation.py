"""What a run of streams on a grid has seen, and must not have: noted on the device, read without waiting for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.utils._python_dispatch import _disable_current_modes

from petra_zoo.errors import Failure, UserError


class NotRecomputedError(Failure):
    """A branch that is to be recomputed to the bit was not; names its unit."""


class Ranges:
    """The largest values that streams were to take, in parts of their range: one number per device.

    And of each unit whose branch is recomputed to the bit a number, 0-d: 0 where it was, infinity where it was not.
    """

    def __init__(self) -> None:
        self.seen: dict[torch.device, Tensor] = {}
        self.differs: dict[str, Tensor] = {}  # by unit, in the order in which they go backward

    def take(self, part: Tensor) -> None:
        """Takes note of a value, 0-d."""
        seen = self.seen.get(part.device)
        if seen is None:
            self.seen[part.device] = part
        else:
            torch.maximum(seen, part, out=seen)

    def differ(self, unit: str, differs: Tensor) -> None:
        """Takes note of whether a unit's branch was not recomputed to the bit, 0-d."""
        seen = self.differs.get(unit)
        if seen is None:
            self.differs[unit] = differs
        else:
            torch.maximum(seen, differs, out=seen)

    def beyond(self) -> list[Tensor]:
        """Numbers, 0-d on their devices, that are finite where all values were in range; waits for nothing."""
        return [torch.where(part <= 1.0, part, torch.inf) for part in self.seen.values()]

    def devices(self) -> set[torch.device]:
        """Where there are notes."""
        return {x.device for x in (*self.seen.values(), *self.differs.values())}

    def worst(self, device: torch.device) -> Tensor:
        """A number, 0-d on the device, that is at most 1 where nothing there was wrong; waits for nothing."""
        numbers = [x for x in (*self.seen.values(), *self.differs.values()) if x.device == device]
        return numbers[0] if len(numbers) == 1 else torch.stack(numbers).amax()

    def forget(self) -> None:
        """As if nothing had been seen; the tensors stay: a captured graph goes on writing there."""
        for seen in (*self.seen.values(), *self.differs.values()):
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

    On the CPU what must not be raises at once. A GPU's is noted there, and the note is copied to the host while
    the next ones are taken: the error comes about a step late, and nobody waits. `check` waits for it. Who reads notes
    by themselves, as stages of a pipeline do, have them taken `into` their own. Recomputations are read at the end of
    the backward pass, once for all of them: it is the last moment at which nothing has been updated by such gradients,
    and unlike the next forward it always comes. Copies and pickles begin with nothing seen.

    Attributes:
        deferred: as on a GPU, wherever values are.
    """

    def __init__(self) -> None:
        self.deferred = False
        self._own = Ranges()
        self._into: Ranges | None = None
        self._on_their_way: dict[torch.device, _OnItsWay] = {}
        self._range = 0.0
        self._backward = -1  # the backward pass at whose end it is read

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

    def note(self, peak: Tensor, grid: float, most: float) -> bool:
        """Takes note of values before they are clamped.

        Args:
            peak: the largest absolute value, 0-d, in steps of the grid.
            grid: the step.
            most: how many there may be.

        Returns:
            Whether it is known that there is nothing to clamp.

        Raises:
            UserError: it is beyond the range, or not a number; on a GPU: an earlier one was.
        """
        if peak.is_meta:
            return False
        self._range = grid * most
        if self._into is not None:
            self._into.take(peak.detach().float() / most)
        elif self._reads_at_once(peak):
            self._judge(peak.item() / most)
            return True
        else:
            self._own.take(peak.detach().float() / most)
            self.look()
        return False

    def compare(self, unit: str, then: Tensor, now: Tensor) -> None:
        """Takes note of the checksums, 0-d, of a unit's branch in its forward and in its recomputation.

        Raises:
            NotRecomputedError: they differ, on the CPU.
        """
        if then.is_meta:
            return
        if self._into is None and self._reads_at_once(then):
            if then.item() != now.item():
                raise _not_recomputed(unit)
            return
        differs = torch.where(then == now, 0.0, torch.inf)
        if self._into is not None:
            self._into.differ(unit, differs)
        else:
            self._own.differ(unit, differs)
            self._read_at_the_end()

    def look(self) -> None:
        """Judges what has arrived of a GPU's notes, and sends for newer ones; waits for nothing.

        Raises:
            UserError: a value was beyond the range, or not a number.
            NotRecomputedError: see `check`.
        """
        for device in self._own.devices():
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                continue  # a graph that is replayed runs no Python: who replays it looks
            sent = self._on_their_way.setdefault(device, _OnItsWay(device))
            if sent.arrived:
                with _disable_current_modes():  # no operation of the network's, and no read that waits
                    beyond = not sent.value.item() <= 1.0
                    sent.send(self._own.worst(device))
                if beyond:
                    self.check()  # which of them it was, said once

    def check(self) -> None:
        """Reads what was noted, and forgets it: waits for the device.

        Raises:
            UserError: a value was beyond the range, or not a number.
            NotRecomputedError: a branch was not recomputed to the bit; the first on the way back is named.
        """
        parts = [seen.item() for seen in self._own.seen.values()]
        differs = {unit: seen.item() for unit, seen in self._own.differs.items()}
        self._own.forget()
        self._on_their_way.clear()
        for part in parts:
            self._judge(part)
        for unit, number in differs.items():
            if number > 0.0:
                raise _not_recomputed(unit)

    def _reads_at_once(self, x: Tensor) -> bool:
        return x.is_cpu and not self.deferred

    def _judge(self, part: float) -> None:
        if not part <= 1.0:
            raise UserError(
                f"exact inversion needs |stream| < {self._range:g}, found {part * self._range:g}: use a coarser grid "
                "(exact=True: a smaller exact_bits; streams='fixed16': choose_grids), or float32 streams without exact"
            )

    def _read_at_the_end(self) -> None:
        """Of the backward pass under way, once; outside of any, somebody else reads."""
        backward = torch._C._current_graph_task_id()
        if backward >= 0 and backward != self._backward:
            self._backward = backward
            Variable._execution_engine.queue_callback(self.check)  # the range too: beyond it nothing comes back


def _not_recomputed(unit: str) -> NotRecomputedError:
    return NotRecomputedError(
        f"the branch of {unit} did not give in the backward, bit for bit, what it gave in the forward, on which exact "
        "inversion rests: a kernel that is not deterministic, a weight changed in between through .data, or a state of "
        "the branch's own; see torch.use_deterministic_algorithms, or use exact=False"
    )


def saturations_in(module: nn.Module) -> list[Saturation]:
    """Those that a module and its sub-modules keep."""
    return [x for m in module.modules() for x in vars(m).values() if isinstance(x, Saturation)]
