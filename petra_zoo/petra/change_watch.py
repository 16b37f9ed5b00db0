"""What a captured tick takes for granted: which tensors there are, where they lie, in which modes the modules are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from operator import attrgetter, is_

import torch
from torch import Tensor, nn

from petra_zoo.petra.fifo import Ring
from petra_zoo.petra.stage import Stage
from petra_zoo.reversible import CoupledUnit

_changes, _trains, _mode = attrgetter("_version"), attrgetter("requires_grad"), attrgetter("training")


class ChangeWatch:
    """Notices what replaces a tensor, or fills it anew, between two ticks: loading, moving, freezing, surgery.

    A replayed tick changes parameters and buffers without counting it as a modification, so that what it did itself
    is not noticed. A look takes some ten microseconds for a hundred tensors, and every tick takes one.

    Args:
        stages: whose parameters, buffers and optimizers are watched.
    """

    def __init__(self, stages: Sequence[Stage]) -> None:
        self.stages = list(stages)
        self.units = [unit for stage in stages for unit in stage.units]
        self._facts: list[object] | None = None

    def look(self) -> None:
        """Takes note of how everything is now."""
        self._modules = list(dict.fromkeys(m for unit in self.units for m in unit.state.modules))
        self._rings = [kept for stage in self.stages for kept in stage.kept if isinstance(kept, Ring)]
        self._holders: list[dict[str, Tensor | nn.Module | None]] = []
        for m in self._modules:
            held = (vars(m)["_parameters"], vars(m)["_buffers"], vars(m)["_modules"])
            self._holders += [x for x in held if x]
        self._objects = list(self._objects_now())
        self._tensors = [x for x in self._objects if isinstance(x, Tensor)]
        self._facts = self._facts_now()

    def changed(self) -> bool:
        """Whether something is not as it was at the last look; nothing is before the first."""
        if self._facts is None:
            return False
        now = list(self._objects_now())
        same = len(now) == len(self._objects) and all(map(is_, now, self._objects))
        return not same or self._facts_now() != self._facts

    def _objects_now(self) -> Iterator[Tensor | nn.Module | None]:
        return chain(
            chain.from_iterable(map(dict.values, self._holders)),
            chain.from_iterable(ring.buffers for ring in self._rings),
        )

    def _facts_now(self) -> list[object]:
        return [
            list(map(Tensor.data_ptr, self._tensors)),
            list(map(_changes, self._tensors)),
            list(map(_trains, self._tensors)),
            list(map(_mode, self._modules)),
            [unit.coupling() if isinstance(unit, CoupledUnit) else unit.reversible for unit in self.units],
            [unit.anchor for unit in self.units],
            [_of_optimizer(stage.optimizer) for stage in self.stages],
            (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark),
            (torch.is_autocast_enabled("cuda"), torch.is_autocast_enabled("cpu")),
        ]


def _of_optimizer(optimizer: torch.optim.Optimizer | None) -> object:
    if optimizer is None:
        return None
    groups: Iterable[dict[str, object]] = optimizer.param_groups
    settings = [[x for key, x in group.items() if key not in ("params", "lr")] for group in groups]
    return id(optimizer.state), id(optimizer.param_groups), settings
