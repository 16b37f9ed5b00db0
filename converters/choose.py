"""Choosing the coupling of each run by the reconstruction error measured on it.

Inverting a block divides rounding errors by g, so that a small coupling (close to the source) needs a short run, and a
long run a large coupling or anchors: inputs that are kept. No estimate is trusted: what counts is the error found by
running a layer forward and back.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from petra_zoo.converters.reconstruction import CoupledRun, InversionTrial, behind, behind_the_stem
from petra_zoo.models import CoupledLayer, PetraRevNet
from petra_zoo.models.branch_scaling import scale_branches
from petra_zoo.models.petra_revnet import LAYERS
from petra_zoo.models.resnet_weights import SHORT_RUN

Purpose = Literal["one-device", "petra"]
CANDIDATES = (1 / 16, 1 / 8, 1 / 4, 1 / 2)


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
    inputs = behind_the_stem(model, images)
    for name, wanted in zip(LAYERS, coupling, strict=True):
        layer: CoupledLayer = getattr(model, name)
        blocks = len(layer.in_run())
        layer, run = _choose(name, layer, inputs, candidates(wanted, blocks, purpose), tolerance)
        setattr(model, name, layer)
        runs.append(run)
        inputs = behind(name, layer, inputs)
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
    inputs = behind_the_stem(model, images)
    for name in LAYERS:
        layer: CoupledLayer = getattr(model, name)
        runs.append(_anchor(name, layer, InversionTrial(layer, inputs), tolerance))
        inputs = behind(name, layer, inputs)
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
        trial = InversionTrial(coupled, inputs)
        error = trial.error(0, tolerance)
        if error <= tolerance:
            return coupled, CoupledRun(name, blocks, g, 0, error)
    return coupled, _anchor(name, coupled, trial, tolerance)


def _anchor(name: str, layer: CoupledLayer, trial: InversionTrial, tolerance: float) -> CoupledRun:
    blocks = len(layer.in_run())
    for anchor_every in (0, *reversed(range(1, blocks))):
        error = trial.error(anchor_every, tolerance)
        if error <= tolerance:
            break
    layer.anchor_every = anchor_every
    return CoupledRun(name, blocks, layer.g(), anchor_every, error)
