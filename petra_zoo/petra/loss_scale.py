"""Gradients in float16: small ones would vanish, and so every stage goes backward with larger ones.

A stage multiplies what comes down by a power of two, and divides what it has found by it: in float32, which holds both.
The streams and their gradients are float32 under autocast to float16, so that the factor need not travel: each stage
has its own, as large as its own gradients allow, where frameworks with one loss have one for the whole network. It
halves when a gradient has overflowed here, and the micro-batch is left out; after many that have not, it doubles
(Micikevicius et al., arXiv 1710.03740, section 3.2).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from petra_zoo.petra.finite import pooled
from petra_zoo.reversible import Gradients

INITIAL, MOST = 2.0**16, 2.0**24
GROWS_AFTER = 2000  # micro-batches without an overflow
Found = dict[int, Tensor]  # gradients by parameter's id


class Scale(Protocol):
    """What a stage does to gradients around its backward."""

    def of_loss(self, loss: Tensor) -> Tensor:
        """A loss, 0-d, of which the backward begins."""

    def enlarged(self, gradients: Gradients) -> Gradients:
        """What comes down."""

    def restored(self, found: Found, gradients: Gradients) -> tuple[Found, Gradients]:
        """The parameters' gradients and what goes down, as they are without a factor."""

    def state_dict(self) -> dict[str, int] | None:
        """What it remembers between two ticks."""

    def load_state_dict(self, state: dict[str, int] | None) -> None:
        """Restores what `state_dict` gave."""


class NoScale(Scale):
    """Leaves everything as it is."""

    def of_loss(self, loss: Tensor) -> Tensor:
        return loss

    def enlarged(self, gradients: Gradients) -> Gradients:
        return gradients

    def restored(self, found: Found, gradients: Gradients) -> tuple[Found, Gradients]:
        return found, gradients

    def state_dict(self) -> None:
        return None

    def load_state_dict(self, state: dict[str, int] | None) -> None:
        pass


class LossScale(Scale):
    """A factor that follows what the stage's gradients bear; nobody reads it on the host."""

    def __init__(self) -> None:
        self._start = (INITIAL, 0.0)
        self._numbers: Tensor | None = None  # the factor, and micro-batches since it last changed: [2]
        self._came: Tensor | None = None  # whether what came down was finite, 0-d

    def of_loss(self, loss: Tensor) -> Tensor:
        self._came = loss.detach().isfinite()
        return loss * self._on(loss.device)[0]

    def enlarged(self, gradients: Gradients) -> Gradients:
        number = pooled([d for d in gradients if d is not None])
        self._came, factor = number.isfinite(), self._on(number.device)[0]
        return _times(gradients, factor)

    def restored(self, found: Found, gradients: Gradients) -> tuple[Found, Gradients]:
        assert self._numbers is not None, "a backward begins with a loss, or with what comes down"
        inverse = 1.0 / self._numbers[0]
        found = {key: d.float() * inverse for key, d in found.items()}
        gradients = _times(gradients, inverse)
        self._follow(pooled([*found.values(), *(d for d in gradients if d is not None)]).isfinite())
        return found, gradients

    def _follow(self, finite: Tensor) -> None:
        """Changes the factor by what has become of a micro-batch; one that came down spoilt says nothing of it."""
        assert self._numbers is not None
        assert self._came is not None
        factor, passed = self._numbers
        overflow, passed = self._came & ~finite, passed + finite
        grows = passed >= GROWS_AFTER
        factor = torch.where(overflow, factor / 2.0, torch.where(grows, factor * 2.0, factor))
        passed = torch.where(overflow | grows, 0.0, passed)
        self._numbers.copy_(torch.stack([factor.clamp(1.0, MOST), passed]))

    def _on(self, device: torch.device) -> Tensor:
        if self._numbers is None:
            self._numbers = torch.tensor(self._start, device=device)
        return self._numbers

    def state_dict(self) -> dict[str, int]:
        factor, passed = self._start if self._numbers is None else self._numbers.tolist()
        return {"factor": int(factor), "passed": int(passed)}

    def load_state_dict(self, state: dict[str, int] | None) -> None:
        if state is None:
            return
        self._start = float(state["factor"]), float(state["passed"])
        if self._numbers is not None:  # where it lies
            self._numbers.copy_(torch.tensor(self._start))


def scale_for(autocast: torch.dtype | None) -> Scale:
    """What a stage needs that computes under autocast to a type."""
    return LossScale() if autocast == torch.float16 else NoScale()


def _times(gradients: Gradients, factor: Tensor) -> Gradients:
    return tuple(None if d is None else (d.float() * factor).to(d.dtype) for d in gradients)
