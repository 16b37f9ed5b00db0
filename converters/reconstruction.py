"""How well the runs of a reversible ResNet can be inverted: run forward and back, and compared.

Batch norms are tried with the statistics of a batch (training) and with running ones (fine-tuning with frozen norms).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from petra_zoo.converters.reestimation import batch_statistics
from petra_zoo.errors import UserError
from petra_zoo.models import CoupledLayer, PetraRevNet
from petra_zoo.models.petra_revnet import LAYERS
from petra_zoo.reversible import CoupledUnit, Streams, untouched

MEASURED_IMAGES = 16  # are enough to find the error of a reconstruction


@dataclass(frozen=True)
class CoupledRun:
    """A run of reversible blocks and how well it can be inverted.

    Attributes:
        layer: its layer's name.
        blocks: how many blocks have an inverse where g > 0.
        g: the coupling.
        anchor_every: after how many blocks the streams are kept; 0: never.
        error: largest relative error of a reconstructed input, 0 where nothing is reconstructed.
    """

    layer: str
    blocks: int
    g: float
    anchor_every: int
    error: float


def measure_runs(model: PetraRevNet, images: Tensor) -> list[CoupledRun]:
    """The runs of a converted model with their reconstruction error on images [B, C, H, W]."""
    runs = []
    inputs = behind_the_stem(model, images)
    for name in LAYERS:
        layer: CoupledLayer = getattr(model, name)
        error = InversionTrial(layer, inputs).error(layer.anchor_every)
        runs.append(CoupledRun(name, len(layer.in_run()), layer.g(), layer.anchor_every, error))
        inputs = behind(name, layer, inputs)
    return runs


class InversionTrial:
    """A layer run forward, in both modes, so that it can be inverted with different anchors."""

    def __init__(self, layer: CoupledLayer, inputs: list[Tensor]) -> None:
        self._layer = layer
        self._forwards: list[tuple[bool, list[Streams]]] = []
        units, _ = layer.units("layer", lambda h: h)
        self._units = [unit for unit in units if isinstance(unit, CoupledUnit) and unit.reversible]
        if not self._units:
            return
        for training, h in enumerate(inputs):
            streams: Streams = (layer.enter(h),)
            states = [streams]
            with batch_statistics(layer, bool(training)), untouched(layer), torch.no_grad():
                for unit in units:
                    streams = unit(*streams)
                    states.append(streams)
            self._forwards.append((bool(training), states[-len(self._units) - 1 :]))

    def error(self, anchor_every: int, tolerance: float = float("inf")) -> float:
        """The largest relative error among the inputs that the backward pass hands from unit to unit.

        Measuring ends where an error exceeds `tolerance`: that many blocks do not pass.
        """
        worst = 0.0
        for training, states in self._forwards:
            found = states[-1]
            with batch_statistics(self._layer, training), torch.no_grad():
                for i in reversed(range(len(self._units))):
                    unit = self._units[i]
                    found = unit.reverse(found, (None, None), []).inputs
                    if anchor_every and i and i % anchor_every == 0:
                        found = states[i]
                    pairs = zip(unit.values(found), unit.values(states[i]), strict=True)
                    worst = max([worst, *(_relative_error(x, expected) for x, expected in pairs)])
                    if worst > tolerance:
                        return worst
        return worst


def _relative_error(found: Tensor, expected: Tensor) -> float:
    error = float((found - expected).norm() / expected.norm().clamp_min(torch.finfo(expected.dtype).tiny))
    return error if error == error else float("inf")


def behind_the_stem(model: PetraRevNet, images: Tensor) -> list[Tensor]:
    """What layer1 gets from images [B, C, H, W]: with running statistics and, where they have any, with their own."""
    like = next(model.parameters())
    modules = torch.nn.Sequential(model.conv1, model.bn1, model.act1, model.maxpool)
    inputs = []
    for training in (False, True)[: min(2, len(images))]:
        with batch_statistics(modules, training), untouched(modules), torch.no_grad():
            inputs.append(modules(images.to(like.device, like.dtype)))
    return inputs


def behind(name: str, layer: CoupledLayer, inputs: list[Tensor]) -> list[Tensor]:
    """What a layer gives for such inputs.

    Raises:
        UserError: its outputs are not finite.
    """
    outputs = []
    for training, h in enumerate(inputs):
        with batch_statistics(layer, bool(training)), untouched(layer), torch.no_grad():
            outputs.append(layer(h))
        if not torch.isfinite(outputs[-1]).all():
            raise UserError(
                f"the activations behind {name} are not finite: check the source's weights and the images' "
                "normalisation"
            )
    return outputs
