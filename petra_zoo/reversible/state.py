"""What the modules of a unit hold, so that a second evaluation sees what the first one saw and leaves no trace.

Two things may differ between a unit's forward and its recomputation. Other tensors may stand in the module
(`torch.func.functional_call` puts its own there for the length of a call), and buffers may have moved on: batch-norm
statistics, the vectors of a spectral norm, counters. Which buffers can move is known from the modules' types when the
state is built:

* the batch norms of torch and timm: in train mode they use batch statistics and only *update* the running ones. Their
  own switch, `track_running_stats`, keeps them from it, and nothing is copied;
* modules without buffers: nothing;
* all others: a copy from before the evaluation, for as long as the evaluation turns out to have changed them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeGuard

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

_KNOWN = ("torch.nn.modules.", "timm.layers.")  # batch norms whose forward is known to heed track_running_stats
_SWITCHED = ("running_mean", "running_var", "num_batches_tracked")

Slot = tuple[dict[str, Tensor | None], str]  # a module's _parameters or _buffers, and a name in it


class ModuleState:
    """The places where a module and its sub-modules keep tensors; built once, as long as no sub-module is replaced.

    Args:
        module: a unit, or any other module.
        outside: modules that it does not contain, of whose own it reads mode and buffers, but changes none.

    Attributes:
        modules: all of them, those outside last.
        norms: the batch norms whose own switch keeps them from moving their statistics.
    """

    def __init__(self, module: nn.Module, outside: Sequence[nn.Module] = ()) -> None:
        self._module = module
        inside = list(module.modules())
        self.modules = [*inside, *outside]
        self.norms: list[_BatchNorm] = [m for m in inside if _updates_by_a_switch(m)]
        # Slots: parameters, and the outside modules' buffers, which stay like these; behind them buffers that move.
        self.slots: list[Slot] = [(vars(m)["_parameters"], name) for m in inside for name in m._parameters]
        self.slots += [(m._buffers, name) for m in outside for name in m._buffers]
        self.parameters = range(len(self.slots))
        # By index of slot: the norms' statistics, and buffers that only a copy can keep.
        self.statistics: dict[int, nn.Module] = {}
        self.others: list[int] = []
        self.uncounted: set[int] = set()  # those that torch's kernels change without counting it as a modification
        switched = set(self.norms)
        for m in inside:
            for name in m._buffers:
                if name in _SWITCHED and m in switched:
                    self.statistics[len(self.slots)] = m
                else:
                    self.others.append(len(self.slots))
                    if isinstance(m, _NormBase):
                        self.uncounted.add(len(self.slots))
                self.slots.append((m._buffers, name))

    def name(self, i: int) -> str:
        """The name of slot i: for a message, so looked for when it is needed."""
        tensors, name = self.slots[i]
        places = self._module.named_modules()
        path = next((path for path, m in places if tensors is m._parameters or tensors is m._buffers), "")
        return f"{path}.{name}".lstrip(".")

    def tensors(self) -> list[Tensor | None]:
        """What stands in the slots now: the objects themselves."""
        return [tensors.get(name) for tensors, name in self.slots]

    def used_statistics(self) -> list[int]:
        """Slots of the statistics that an evaluation reads now instead of updating them: norms in eval mode.

        The counter `num_batches_tracked` among them tells of updates: torch's kernel does not count as a modification
        of the running mean and variance.
        """
        return [i for i, norm in self.statistics.items() if not norm.training]

    @contextmanager
    def holding(self, tensors: Sequence[Tensor | None]) -> Iterator[None]:
        """Inside, the given tensors stand in the slots; outside, what stood there before."""
        now = self.tensors()
        changed = [i for i, (mine, given) in enumerate(zip(now, tensors, strict=True)) if mine is not given]
        for i in changed:
            self._put(i, tensors[i])
        try:
            yield
        finally:
            for i in changed:
                self._put(i, now[i])

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """Inside, evaluations use batch statistics where they would anyway, and no buffer is changed by them."""
        # A micro-batch counts once in the running statistics, in its forward: a recomputation that updated them too
        # would weigh it twice, and under PETRA with activations of other parameters.
        norms = [m for m in self.norms if m.training and m.track_running_stats]
        for m in norms:
            m.track_running_stats = False
        before = {i: x for i in self.others if (x := self.slots[i][0].get(self.slots[i][1])) is not None}
        for i, x in before.items():
            self._put(i, x.clone())
        try:
            yield
        finally:
            for i, x in before.items():
                self._put(i, x)
            for m in norms:
                m.track_running_stats = True

    def _put(self, i: int, x: Tensor | None) -> None:
        tensors, name = self.slots[i]
        tensors[name] = x


class Held:
    """The tensors that one evaluation of a module saw.

    Args:
        state: the module's.
    """

    def __init__(self, state: ModuleState) -> None:
        self.state = state
        self.tensors = state.tensors()
        self._before: dict[int, Tensor] = {}
        watched = [*state.parameters, *state.used_statistics()]
        self._versions = {i: version_of(x) for i in watched if (x := self.tensors[i]) is not None}

    def begin(self) -> None:
        """To be called in front of the evaluation: other units, with the same modules, may have run by now."""
        for i in self.state.others:
            tensors, name = self.state.slots[i]
            self.tensors[i] = x = tensors.get(name)
            if x is not None:
                self._before[i] = x.detach().clone()
                self._versions[i] = version_of(x)

    def evaluated(self) -> None:
        """To be called behind the evaluation: buffers that it changed are held as they were before it."""
        now = self.state.tensors()
        for i, copy in self._before.items():
            x = self.tensors[i]
            if i in self.state.uncounted or now[i] is not x or version_of(x) != self._versions[i]:
                self.tensors[i] = copy
                self._versions[i] = version_of(copy)
        self._before.clear()

    def trainable(self) -> list[Tensor]:
        """The tensors that want gradients, each once."""
        return list({id(x): x for x in self.tensors if x is not None and x.requires_grad}.values())

    def modified(self) -> str | None:
        """The name of a tensor that was modified in place since, if there is one."""
        for i, version in self._versions.items():
            if version_of(self.tensors[i]) != version:
                return self.state.name(i)
        return None


def version_of(x: Tensor | None) -> int:
    """How often a tensor was modified in place; -1 where nobody counts (inference mode)."""
    return -1 if x is None or x.is_inference() else x._version


@contextmanager
def untouched(*modules: nn.Module) -> Iterator[None]:
    """Inside, evaluating the modules changes none of their buffers; see `ModuleState.untouched`."""
    if not modules:
        yield
        return
    with ModuleState(nn.ModuleList(modules)).untouched():
        yield


def _updates_by_a_switch(module: nn.Module) -> TypeGuard[_BatchNorm]:
    return isinstance(module, _BatchNorm) and type(module).forward.__module__.startswith(_KNOWN)
