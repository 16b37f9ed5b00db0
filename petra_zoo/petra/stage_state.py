"""A stage as plain values, for whoever saves it."""

from __future__ import annotations

from typing import NotRequired, TypedDict

from torch import Tensor

from petra_zoo.petra.optimization import State
from petra_zoo.reversible import Streams


class StageState(TypedDict):
    """A stage as plain values; `auxiliary` is of modules of its own, which are not the model's."""

    optimizer: State | None
    scheduler: State | None
    gradients: list[Tensor | None]
    gradients_in_window: int
    in_flight: State
    updates: NotRequired[int]
    prediction: NotRequired[State | None]
    auxiliary: NotRequired[dict[str, Tensor] | None]
    gate: NotRequired[dict[str, int] | None]
    scale: NotRequired[dict[str, int] | None]


def copies(tensors: Streams) -> Streams:
    """Copies of tensors out of a state, which stays its owner's."""
    return tuple(x.clone() for x in tensors)
