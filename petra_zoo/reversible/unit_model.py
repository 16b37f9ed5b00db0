"""What a network must have for the engine to train it: a list of its units, and what every `nn.Module` has."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol, Self

import torch
from torch import Tensor, nn

from petra_zoo.errors import UserError
from petra_zoo.reversible.unit import Unit


class UnitModel(Protocol):
    """A network that is a list of units; any `nn.Module` with `units()` is one.

    Running the units one after the other, from the same generator state, equals `model(x)` in train and eval mode.
    """

    training: bool

    def units(self) -> list[Unit]:
        """The units, in the order in which they run; each has a name of its own."""
        ...

    def __call__(self, x: Tensor, /) -> Tensor: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def buffers(self) -> Iterator[Tensor]: ...

    def named_buffers(self) -> Iterator[tuple[str, Tensor]]: ...

    def modules(self) -> Iterator[nn.Module]: ...

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> tuple[list[str], list[str]]: ...

    def train(self, mode: bool = True) -> Self: ...

    def eval(self) -> Self: ...

    def to(self, device: torch.device | str) -> Self: ...


def units_of(model: nn.Module | UnitModel) -> list[Unit]:
    """The units of a model: the one check that it is a `UnitModel`.

    Raises:
        UserError: it has no `units()`, they are no list, one of them is no `Unit`, or two have the same name.
    """
    kind = type(model).__name__
    listed = getattr(model, "units", None)
    if not callable(listed):
        raise UserError(
            f"{kind} has no units(): petra-zoo convert makes a reversible network of most; "
            "docs/extending.md says how to write units()"
        )
    given = listed() or ()
    if not isinstance(given, Iterable):
        raise UserError(f"units() of {kind} gives a {type(given).__name__}: expected a list of units")
    units = list(given)  # at once: a generator can be read only once
    if not units:
        raise UserError(f"units() of {kind} is empty: it lists the network's units, at least one")
    for unit in units:
        if not isinstance(unit, Unit):
            raise UserError(
                f"units() of {kind} lists a {type(unit).__name__}, which is no petra_zoo.reversible.Unit: "
                "make it a FunctionUnit or a CoupledUnit"
            )
    names = [unit.name for unit in units]
    if twice := next((name for i, name in enumerate(names) if name in names[:i]), None):
        raise UserError(f"units() of {kind} lists two units named {twice!r}: each needs a name of its own")
    return units
