"""What a captured tick takes for granted: which tensors there are, where they lie, in which modes the modules are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from operator import attrgetter, is_

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from petra_zoo.petra.fifo import Ring
from petra_zoo.petra.stage import Stage
from petra_zoo.reversible import CoupledUnit, Unit
from petra_zoo.reversible.plain_path import carries_hook

_changes, _trains, _mode = attrgetter("_version"), attrgetter("requires_grad"), attrgetter("training")


class ChangeWatch:
    """Notices what replaces a tensor, or fills it anew, between two ticks: loading, moving, freezing, surgery.

    A replayed tick changes parameters and buffers without counting it as a modification, so that what it did itself
    is not noticed. A look takes some ten microseconds for a hundred tensors, and every tick takes one.

    Args:
        modules: whose parameters, buffers, modes and plain numbers (a dropout's rate) are watched, as they are now.
        optimizers: whose state and settings are, but for the learning rate.
        units: whose couplings are, wherever they come from.
        rings: whose buffers are.

    Attributes:
        hooked: whether a module or a parameter had a hook at the last look, which wants to be called in every tick.
    """

    def __init__(
        self,
        modules: Callable[[], Iterable[nn.Module]],
        optimizers: Sequence[Optimizer] = (),
        units: Sequence[Unit] = (),
        rings: Callable[[], Iterable[Ring]] = tuple,
    ) -> None:
        self.modules, self.optimizers, self.units, self.rings = modules, optimizers, units, rings
        self.hooked = False
        self._facts: list[object] | None = None

    @classmethod
    def of(cls, stages: Sequence[Stage]) -> ChangeWatch:
        """Over the stages of a pipeline."""
        units = [unit for stage in stages for unit in stage.units]
        losses = {stage.settings.loss for stage in stages}
        of_losses = [m for loss in losses if isinstance(loss, nn.Module) for m in loss.modules()]
        return cls(
            lambda: chain((m for unit in units for m in unit.state.modules), of_losses),
            [stage.optimizer for stage in stages if stage.optimizer],
            units,
            lambda: (kept for stage in stages for kept in stage.kept if isinstance(kept, Ring)),
        )

    def look(self) -> None:
        """Takes note of how everything is now."""
        self._modules = list(dict.fromkeys(self.modules()))
        self._rings = list(self.rings())
        self._holders: list[dict[str, Tensor | nn.Module | None]] = []
        for m in self._modules:
            held = (vars(m)["_parameters"], vars(m)["_buffers"], vars(m)["_modules"])
            self._holders += [x for x in held if x]
        values = list(map(vars, self._modules))
        self._numbers = [(x, key) for x in values for key in x if type(x[key]) in (float, int)]
        self._objects = list(self._objects_now())
        self._tensors = [x for x in self._objects if isinstance(x, Tensor)]
        # A running statistic may be filled anew: graphs read what it is then. A number may have been read by the host.
        self._counted = [x for x in self._tensors if isinstance(x, nn.Parameter) or x.ndim == 0]
        self._facts = self._facts_now()
        self.hooked = any(map(carries_hook, self._modules)) or any(x._backward_hooks for x in self._counted)

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
            chain.from_iterable(map(_kept_by, self.optimizers)),
        )

    def _facts_now(self) -> list[object]:
        return [
            list(map(Tensor.data_ptr, self._tensors)),
            list(map(_changes, self._counted)),
            list(map(_trains, self._counted)),
            list(map(_mode, self._modules)),
            [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in self._modules],
            [len(x._backward_hooks or ()) for x in self._counted],
            [vars(m).get("forward") for m in self._modules],
            [values.get(key) for values, key in self._numbers],
            list(map(_of_unit, self.units)),
            list(map(_of_optimizer, self.optimizers)),
            (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark),
            (torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()),
            [(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cuda", "cpu")],
        ]


def _of_unit(unit: Unit) -> object:
    if isinstance(unit, CoupledUnit):
        return unit.coupling(), unit.anchor, vars(unit.block).get("compiled")
    return unit.reversible, unit.anchor


def _of_optimizer(optimizer: Optimizer) -> object:
    groups: Iterable[dict[str, object]] = optimizer.param_groups
    settings = [[x for key, x in group.items() if key not in ("params", "lr")] for group in groups]
    return settings


def _kept_by(optimizer: Optimizer) -> Iterator[Tensor]:
    """The tensors of an optimizer's state: updates read and write those that were there at the capture."""
    states: Iterable[dict[str, Tensor]] = optimizer.state.values()
    return (x for state in states for x in state.values() if isinstance(x, Tensor))
