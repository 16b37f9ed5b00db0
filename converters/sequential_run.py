"""A run whose blocks sit in a `ReversibleSequential`: transformers, and chains of any blocks."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from petra_zoo.converters.runs import BlockRun, Call
from petra_zoo.models.layer_parts import first_stream
from petra_zoo.models.reversible_sequential import ReversibleSequential, Units
from petra_zoo.reversible import Streams, Unit


class SequentialRun(BlockRun):
    """A container of blocks of any kind. What a block adds is scaled by the gain, a buffer beside the coupling.

    x[n+1] - x[n] = -g (x[n] - x[n-1]) + s F has the fixed point s F / (1 + g): the gain 1 + g keeps a trained network's
    steps.
    """

    container: ReversibleSequential

    @property
    def blocks(self) -> int:
        return len({step.index for step in self.container.steps() if step.in_run})

    @property
    def anchor_every(self) -> int:
        return self.container.anchor_every

    @anchor_every.setter
    def anchor_every(self, blocks: int) -> None:
        self.container.anchor_every = blocks

    def couple(self, g: float) -> None:
        container = self.container
        container.set_coupling(g)
        container.set_gain(1.0 + g)
        container.take_any_coupling()

    def units(self, call: Call) -> tuple[list[Unit], Streams]:
        x, *shared = call.args
        units, _ = self.container.units(self.name, first_stream, tuple(shared), named=call.kwargs)
        return units, (self.container.enter(x),)


def sequential_runs(model: nn.Module) -> Sequence[SequentialRun]:
    """The runs of a network's `ReversibleSequential`s, in the order of its modules."""
    return [
        SequentialRun(name or "blocks", module)
        for name, module in model.named_modules()
        if isinstance(module, ReversibleSequential)
    ]


def use_units(model: nn.Module, units: Units) -> None:
    """Has the runs of a network, and of copies that are saved, made of whole blocks or of their branches.

    Raises:
        UserError: blocks are not known by their branches.
    """
    for run in sequential_runs(model):
        run.container.unit_kind = units
        run.container.steps()  # blocks of a class that nobody has registered are refused
    if units != "auto":
        vars(model)["_model_args"] = {**getattr(model, "_model_args", {}), "units": units}  # for config.json
