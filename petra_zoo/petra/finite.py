"""Whether what training computes is still finite."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from petra_zoo.errors import Failure
from petra_zoo.reversible import Unit, UnitModel
from petra_zoo.reversible.saturation import Ranges

OnNonfinite = Literal["stop", "skip"]


class NotFiniteError(Failure):
    """A loss or a gradient is infinite or not a number; says which stage's.

    Attributes:
        fed: the micro-batches that it is of, counted from 0 as one replica feeds them; empty where nobody knows.
    """

    def __init__(self, message: str, fed: range = range(0)) -> None:
        super().__init__(message)
        self.fed = fed


class FiniteCheck:
    """Looks at losses and gradients: at once, but on a GPU when they have arrived, so that nobody waits for the device.

    There a number is left in a place of its own on the device, as a captured tick can do it too, and `look` sends all
    of them to the host, once per tick.

    Args:
        deferred: as on a GPU, wherever numbers are.
        skips: whether micro-batches that are not finite are left out, which is the stages' to do; see `SkippingGate`.
        replicas: of the pipeline, whose micro-batches are numbered together.

    Attributes:
        raises: whether what is not finite is raised where it is found. Else it is only `told`: where several processes
            train together, one that raised it in the middle of a tick would leave the others waiting.
        told: the first that was.
        tick: the present one.
    """

    def __init__(self, deferred: bool = False, *, skips: bool = False, replicas: int = 1) -> None:
        self.deferred, self.skips, self.replicas = deferred, skips, replicas
        self.raises = True
        self.told: NotFiniteError | None = None
        self.tick = 0
        self._places: dict[str, Tensor] = {}  # by what is seen, in the order in which it was first
        self._ages: dict[str, range] = {}  # ticks since its micro-batches were fed
        self._under_way: deque[tuple[Tensor, torch.cuda.Event | None, list[str], int]] = deque()

    def see(self, value: Tensor, what: str, of: Sequence[Tensor] = (), last: int | None = None, count: int = 1) -> bool:
        """Takes note of a number.

        Args:
            value: 0-d, finite where `what` is.
            what: the words that the error begins with; looked at once per tick.
            of: what it was made of, for the error to say what is in there.
            last: the last micro-batch that it is of, if it is of any; `count`: how many there are.

        Returns:
            False where it is known not to be finite, and told.

        Raises:
            NotFiniteError: it is not finite; on a GPU `look` and `settle` raise it.
        """
        value = value.detach()
        newest = self.tick if last is None else last // self.replicas
        self._ages[what] = range(self.tick - newest, self.tick - newest + (0 if last is None else count))
        if not self.waits(value.device):
            return self._judge(value, what, self.tick, of)
        if (place := self._places.get(what)) is not None:
            place.copy_(value)
        else:
            self._places[what] = value.to(torch.float64, copy=True)
        return True

    def waits(self, device: torch.device) -> bool:
        """Whether numbers of a device are looked at later, when they have arrived."""
        return self.deferred or device.type == "cuda"

    def see_ranges(self, ranges: Iterable[Ranges], where: str) -> None:
        """Takes note of what streams on a grid have seen of its range, and of recomputations that were to be exact.

        Raises:
            NotFiniteError: a value was beyond it, or a branch was not recomputed to the bit; see `see`.
        """
        for i, part in enumerate(part for seen in ranges for part in seen.beyond()):
            self.see(part, f"a stream of {where} ({i}), in parts of the range of its grid, which is too fine for it,")
        for seen in ranges:
            for unit, differs in seen.differs.items():
                self.see(differs, f"how far the branch of {unit}, recomputed for exact inversion, is off its bits")

    def look(self) -> None:
        """Sends for the numbers of a tick and judges those of earlier ones that have arrived; waits for none.

        Raises:
            NotFiniteError: a number is not finite; the earliest is named.
        """
        while self._under_way and _arrived(self._under_way[0][1]):
            self._judge_oldest()
        if not self._places:
            return
        values = torch.stack(list(self._places.values()))
        event = None
        if values.is_cuda:
            values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._under_way.append((values, event, list(self._places), self.tick))

    def settle(self) -> None:
        """Waits for what has been seen.

        Raises:
            NotFiniteError: a number is not finite; the earliest is named.
        """
        self.look()
        while self._under_way:
            event = self._under_way[0][1]
            if event is not None:
                event.synchronize()
            self._judge_oldest()

    def forget(self) -> None:
        """As if nothing had been seen; the places stay: a captured tick goes on writing there."""
        for place in self._places.values():
            place.zero_()
        self._under_way.clear()
        self.told = None

    def _judge_oldest(self) -> None:
        values, _, words, tick = self._under_way.popleft()
        for value, what in zip(values, words, strict=True):
            self._judge(value, what, tick)

    def _judge(self, value: Tensor, what: str, tick: int, of: Sequence[Tensor] = ()) -> bool:
        if math.isfinite(number := float(value)):
            return True
        if of:
            number = float(sum(x.sum(dtype=torch.float64) for x in of))
        ages = self._ages[what]
        error = NotFiniteError(f"{what} is {number}", range(tick + 1 - ages.stop, tick + 1 - ages.start))
        if self.raises:
            raise error
        self.told = self.told or error
        return False


class StreamRanges:
    """What a stage's streams have seen of the ranges of their grids: notes of its own, though stages may share a run.

    Args:
        units: of the stage.
        finite: says whether notes are read later; else the streams raise by themselves.
    """

    def __init__(self, units: Sequence[Unit], finite: FiniteCheck) -> None:
        self._finite = finite
        found = [x for unit in units if (x := unit.saturation()) is not None]
        self._notes = {saturation: Ranges() for saturation in found}

    @contextmanager
    def noted(self, device: torch.device) -> Iterator[None]:
        """Inside, what the stage's streams see on a device whose numbers are looked at later is noted here."""
        with ExitStack() as stack:
            for saturation, notes in self._notes.items() if self._finite.waits(device) else ():
                stack.enter_context(saturation.into(notes))
            yield

    def __iter__(self) -> Iterator[Ranges]:
        return iter(self._notes.values())

    def forget(self) -> None:
        """As if nothing had been seen."""
        for notes in self:
            notes.forget()


def pooled(gradients: Sequence[Tensor]) -> Tensor:
    """A number, 0-d, that is finite where all gradients are, and only there; one pass over all of them."""
    present = [x for x in gradients if x.numel()]
    if not present:
        return torch.zeros(())
    if present[0].is_cuda:
        return get_total_norm(present, math.inf)  # a few kernels for all of them
    # A gradient scaler's own look: 1 where something is not finite. It scales, by 1 here. (A GPU's knows no bfloat16.)
    found = torch.zeros((), dtype=torch.float32)
    torch._amp_foreach_non_finite_check_and_unscale_(present, found, torch.ones_like(found))
    return found.atanh_()  # 0 of 0, infinity of 1


def first_not_finite(model: nn.Module | UnitModel) -> str | None:
    """The name of the first parameter or buffer with an infinite value or one that is not a number.

    What is elsewhere (on the meta device) is not looked at.
    """
    named: Iterable[tuple[str, Tensor]] = chain(model.named_parameters(), model.named_buffers())
    found = {name for name, x in named if not x.is_meta and x.is_floating_point() and not x.isfinite().all()}
    return next((name for name in model.state_dict() if name in found), min(found, default=None))


def _arrived(event: torch.cuda.Event | None) -> bool:
    return event is None or event.query()
