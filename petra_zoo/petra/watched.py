"""What a captured tick takes for granted: which tensors there are, where they lie, in which modes the modules are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from petra_zoo.petra.fifo import Fifo, Ring
from petra_zoo.petra.stage import Stage
from petra_zoo.reversible import Unit
from petra_zoo.reversible.state import version_of


class Watched:
    """Notices what replaces a tensor, or fills it anew, between two ticks: loading, moving, freezing, surgery.

    A replayed tick changes parameters and buffers without counting it as a modification, so that what it did itself
    is not noticed.

    Args:
        stages: whose parameters, buffers and optimizers are watched.
    """

    def __init__(self, stages: Sequence[Stage]) -> None:
        self.stages = list(stages)
        self._seen: list[object] | None = None

    def look(self) -> None:
        """Takes note of how everything is now."""
        self._seen = list(self._now())

    def changed(self) -> bool:
        """Whether something is not as it was at the last look; nothing is before the first."""
        return self._seen is not None and self._seen != list(self._now())

    def _now(self) -> Iterator[object]:
        yield torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
        yield torch.is_autocast_enabled("cuda"), torch.is_autocast_enabled("cpu")
        for stage in self.stages:
            for unit in stage.units:
                yield from _of_unit(unit)
            for fifo in stage.kept:
                yield _of_fifo(fifo)
            if stage.optimizer is not None:
                yield id(stage.optimizer.state), id(stage.optimizer.param_groups)
                for group in stage.optimizer.param_groups:
                    yield [x for key, x in group.items() if key not in ("params", "lr")]


def _of_unit(unit: Unit) -> Iterator[object]:
    yield unit.reversible, unit.anchor
    for module in unit.state.modules:
        yield module.training
        yield [id(child) for child in module._modules.values()]
    for x in unit.state.tensors():
        yield None if x is None else (id(x), x.data_ptr(), version_of(x), x.requires_grad)


def _of_fifo(fifo: Fifo) -> object:
    return [x.data_ptr() for x in fifo.buffers] if isinstance(fifo, Ring) else None
