"""Whether what training computes is still finite."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from petra_zoo.errors import Failure
from petra_zoo.reversible import UnitModel


class NotFiniteError(Failure):
    """A loss or a gradient is infinite or not a number; says which stage's."""


class FiniteCheck:
    """Reads losses and gradients: at once, but on a GPU a tick later, so that nobody waits for the device."""

    def __init__(self) -> None:
        self._under_way: deque[tuple[Tensor, torch.cuda.Event, str]] = deque()

    def see(self, value: Tensor, what: str) -> None:
        """Takes note of a number.

        Args:
            value: 0-d, finite where `what` is.
            what: the words that the error begins with.

        Raises:
            NotFiniteError: it is not finite, or one that was seen before.
        """
        value = value.detach()
        if value.device.type != "cuda":
            _judge(value, what)
            return
        self.settle()
        copy = torch.empty((), dtype=value.dtype, pin_memory=True).copy_(value, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._under_way.append((copy, event, what))

    def settle(self) -> None:
        """Waits for what has been seen.

        Raises:
            NotFiniteError: a number is not finite; the earliest is named.
        """
        while self._under_way:
            copy, event, what = self._under_way.popleft()
            event.synchronize()
            _judge(copy, what)


def pooled(gradients: Sequence[Tensor]) -> Tensor:
    """A number, 0-d, that is finite where all gradients are, and only there; the cheapest there is."""
    present = [x for x in gradients if x.numel()]
    if present and present[0].is_cuda:
        return get_total_norm(present, math.inf)  # two kernels for all of them
    total = torch.zeros(())
    for x in present:
        total = total + x.sum(dtype=torch.float32 if x.element_size() < 4 else None)
    return total


def first_not_finite(model: nn.Module | UnitModel) -> str | None:
    """The name of the first parameter or buffer with an infinite value or one that is not a number.

    What is elsewhere (on the meta device) is not looked at.
    """
    named: Iterable[tuple[str, Tensor]] = chain(model.named_parameters(), model.named_buffers())
    found = {name for name, x in named if not x.is_meta and x.is_floating_point() and not x.isfinite().all()}
    return next((name for name in model.state_dict() if name in found), min(found, default=None))


def _judge(value: Tensor, what: str) -> None:
    if not math.isfinite(number := float(value)):
        raise NotFiniteError(f"{what} is {number}")
