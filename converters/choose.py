"""Choosing the coupling of each run by the reconstruction error measured on it.

Inverting a block divides rounding errors by g, so that a small coupling (close to the source) needs a short run, and a
long run a large coupling or anchors: inputs that are kept. No estimate is trusted: what counts is the error found by
running a layer forward and back.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from petra_zoo.converters.reestimation import batch_statistics
from petra_zoo.errors import UserError
from petra_zoo.models import CoupledLayer, PetraRevNet
from petra_zoo.models.branch_scaling import scale_branches
from petra_zoo.models.petra_revnet import LAYERS
from petra_zoo.models.resnet_weights import SHORT_RUN
from petra_zoo.reversible import CoupledUnit, Streams, untouched

Purpose = Literal["one-device", "petra"]
CANDIDATES = (1 / 16, 1 / 8, 1 / 4, 1 / 2)


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


def candidates(coupling: float | Literal["auto"], blocks: int, purpose: Purpose) -> Sequence[float]:
    """The couplings to try for a run of `blocks` blocks, in order of preference."""
    if coupling != "auto":
        return (coupling,)
    if blocks == 0 or (purpose == "one-device" and blocks <= SHORT_RUN):
        return (0.0,)
    return CANDIDATES


def couple_layers(
    model: PetraRevNet,
    images: Tensor,
    coupling: Sequence[float | Literal["auto"]],
    purpose: Purpose,
    tolerance: float,
) -> list[CoupledRun]:
    """Gives every layer of an unconverted model its coupling, anchors and scaled branches, in place.

    Per layer the first candidate whose error stays within `tolerance` without anchors is taken; where none does, the
    last one with the widest spacing of anchors that does. Each layer is measured behind the converted ones before it,
    with batch statistics (training) and with running ones (fine-tuning with frozen norms); the larger error counts.

    Args:
        model: as `PetraRevNet.from_resnet` makes it, coupling 0.
        images: [B, C, H, W], normalised images or noise.
        coupling: one per layer.
        purpose: what 'auto' should do with short runs.
        tolerance: the largest relative error of a reconstructed input.

    Returns:
        The runs, one per layer.

    Raises:
        UserError: activations are not finite, or a layer's branches cannot be scaled.
    """
    runs = []
    inputs = _stem(model, images)
    for name, wanted in zip(LAYERS, coupling, strict=True):
        layer: CoupledLayer = getattr(model, name)
        blocks = len(layer.in_run())
        layer, run = _choose(name, layer, inputs, candidates(wanted, blocks, purpose), tolerance)
        setattr(model, name, layer)
        runs.append(run)
        inputs = _behind(name, layer, inputs)
    return runs


def anchor_layers(model: PetraRevNet, images: Tensor, tolerance: float) -> list[CoupledRun]:
    """Anchors every run anew, as widely as `tolerance` allows (not at all where it can), its coupling as it is.

    For a model whose statistics have changed since its couplings were chosen. Anchors do not change its function.

    Args:
        model: converted.
        images: [B, C, H, W].
        tolerance: the largest relative error of a reconstructed input.
    """
    runs = []
    inputs = _stem(model, images)
    for name in LAYERS:
        layer: CoupledLayer = getattr(model, name)
        runs.append(_anchor(name, layer, _Trial(layer, inputs), tolerance))
        inputs = _behind(name, layer, inputs)
    return runs


def measure_runs(model: PetraRevNet, images: Tensor) -> list[CoupledRun]:
    """The runs of a converted model with their reconstruction error on images [B, C, H, W]."""
    runs = []
    inputs = _stem(model, images)
    for name in LAYERS:
        layer: CoupledLayer = getattr(model, name)
        error = _Trial(layer, inputs).error(layer.anchor_every)
        runs.append(CoupledRun(name, len(layer.in_run()), layer.g(), layer.anchor_every, error))
        inputs = _behind(name, layer, inputs)
    return runs


def _choose(
    name: str, layer: CoupledLayer, inputs: list[Tensor], couplings: Sequence[float], tolerance: float
) -> tuple[CoupledLayer, CoupledRun]:
    blocks = len(layer.in_run())
    for g in couplings:
        coupled = copy.deepcopy(layer)
        coupled.set_coupling(g)
        coupled.asked_for = None  # a coupling that was chosen or measured may be replaced by a checkpoint's
        if g > 0.0:
            scale_branches(coupled, g)
        trial = _Trial(coupled, inputs)
        error = trial.error(0, tolerance)
        if error <= tolerance:
            return coupled, CoupledRun(name, blocks, g, 0, error)
    return coupled, _anchor(name, coupled, trial, tolerance)


def _anchor(name: str, layer: CoupledLayer, trial: _Trial, tolerance: float) -> CoupledRun:
    blocks = len(layer.in_run())
    for anchor_every in (0, *reversed(range(1, blocks))):
        error = trial.error(anchor_every, tolerance)
        if error <= tolerance:
            break
    layer.anchor_every = anchor_every
    return CoupledRun(name, blocks, layer.g(), anchor_every, error)


class _Trial:
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
                    found = self._units[i].reverse(found, (None, None), []).inputs
                    if anchor_every and i and i % anchor_every == 0:
                        found = states[i]
                    pairs = zip(found, states[i], strict=True)
                    worst = max([worst, *(_relative_error(x, expected) for x, expected in pairs)])
                    if worst > tolerance:
                        return worst
        return worst


def _relative_error(found: Tensor, expected: Tensor) -> float:
    error = float((found - expected).norm() / expected.norm().clamp_min(torch.finfo(expected.dtype).tiny))
    return error if error == error else float("inf")


def _stem(model: PetraRevNet, images: Tensor) -> list[Tensor]:
    """What layer1 gets: with running statistics and, where a batch has any, with batch statistics."""
    like = next(model.parameters())
    modules = torch.nn.Sequential(model.conv1, model.bn1, model.act1, model.maxpool)
    inputs = []
    for training in (False, True)[: min(2, len(images))]:
        with batch_statistics(modules, training), untouched(modules), torch.no_grad():
            inputs.append(modules(images.to(like.device, like.dtype)))
    return inputs


def _behind(name: str, layer: CoupledLayer, inputs: list[Tensor]) -> list[Tensor]:
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
