"""Moving a converted network's couplings to 1 over the first epochs of fine-tuning.

A small coupling predicts what the source predicts; at 1 the inverse is perfectly conditioned. Branches are scaled by
1 + g when a network is converted (whole blocks by their gain), so they are scaled by the ratio whenever g moves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import nn

from petra_zoo.errors import UserError
from petra_zoo.models import CoupledLayer, ReversibleSequential
from petra_zoo.models.branch_scaling import branch_scales
from petra_zoo.models.run_buffers import nearest_gain
from petra_zoo.reversible import COUPLING_STEPS
from petra_zoo.settings.recipe import Recipe

SHORT_RUN = 2  # blocks; one block is inverted, which even g = 1/256 allows


def move_coupling(layer: CoupledLayer | ReversibleSequential, g: float) -> None:
    """Sets a layer's coupling and scales its branches by (1 + g) / (1 + g before), in place.

    Args:
        layer: of a converted network; where it has a gain, that is what is scaled.
        g: a multiple of 1/256 in (0, 1].

    Raises:
        UserError: its branches cannot be scaled.
    """
    if isinstance(layer, ReversibleSequential):
        gain = layer.gain_now() * (1.0 + g) / (1.0 + layer.g())
        layer.set_coupling(g)
        layer.set_gain(nearest_gain(gain))
        return
    before, after = branch_scales(layer, layer.g()), branch_scales(layer, g)
    with torch.no_grad():
        for name, scale in after.items():
            layer.get_parameter(name).mul_(scale / before[name])
    layer.set_coupling(g)


@runtime_checkable
class _Coupled(Protocol):
    """A network with couplings."""

    def coupled_layers(self) -> Sequence[CoupledLayer | ReversibleSequential]: ...

    def named_layers(self) -> Mapping[str, CoupledLayer | ReversibleSequential]: ...


class CouplingSchedule:
    """Moves every coupling of a model linearly to 1 between epochs.

    Between epochs only, when no micro-batch is in flight: what went forward with one coupling cannot be reconstructed
    with another. A moving average of the model moves along: averaging two couplings would give neither.

    Args:
        model: a converted network, before its first step.
        epochs: the first epoch (counted from 0) that trains at coupling 1.

    Raises:
        UserError: the model has no couplings, was built with a fixed one, is exact, or has a run too long to start
            from 0.
    """

    def __init__(self, model: nn.Module, epochs: int) -> None:
        if not isinstance(model, _Coupled):
            raise UserError(f"coupling_epochs={epochs}: a {type(model).__name__} has no coupling to move, set it to 0")
        self.epochs, self._model = epochs, model
        self.starts = [layer.g() for layer in model.coupled_layers()]
        for name, layer in model.named_layers().items():
            if layer.asked_for is not None:
                raise UserError(
                    f"coupling_epochs={epochs}: the network is built with coupling={layer.asked_for:g}, which would "
                    "contradict what is saved: leave coupling out of model_kwargs, or set coupling_epochs=0"
                )
            if layer.grid > 0.0:
                raise UserError(
                    f"coupling_epochs={epochs}: couplings move through values that exact inversion does not take: "
                    "use exact=False, or set coupling_epochs=0"
                )
            if layer.g() == 0.0 and len(layer.in_run()) > SHORT_RUN:
                raise UserError(
                    f"coupling_epochs={epochs}: {name} has {len(layer.in_run())} reversible "
                    "blocks and coupling 0; a first step away from 0 could not be inverted over so many: convert the "
                    "network with --for petra, or set coupling_epochs=0"
                )

    def coupling(self, start: float, epoch: int) -> float:
        """g in an epoch of a run that starts at `start`: a multiple of 1/256, above 0."""
        share = min(1.0, epoch / self.epochs)
        return max(1, round((start + (1.0 - start) * share) * COUPLING_STEPS)) / COUPLING_STEPS

    def moves(self, epoch: int) -> bool:
        """Whether couplings change before this epoch: then nothing may be in flight."""
        layers = self._model.coupled_layers()
        wanted = (self.coupling(start, epoch) for start in self.starts)
        return any(g != layer.g() for g, layer in zip(wanted, layers, strict=True) if layer.in_run())

    def apply(self, epoch: int, *models: nn.Module) -> None:
        """Sets the couplings of an epoch: of the model and, where there is one, of its moving average."""
        for model in models:
            assert isinstance(model, _Coupled)
            for start, layer in zip(self.starts, model.coupled_layers(), strict=True):
                g = self.coupling(start, epoch)
                if g != layer.g() and layer.in_run():
                    move_coupling(layer, g)


def start_schedule(recipe: Recipe, model: nn.Module) -> CouplingSchedule | None:
    """The recipe's schedule, its first couplings set; None where couplings stay.

    Call it before the pipeline is built: whether a unit has an inverse decides what its stage keeps.
    """
    if not recipe.coupling_epochs:
        return None
    schedule = CouplingSchedule(model, recipe.coupling_epochs)
    schedule.apply(0, model)
    return schedule
