"""Choosing the coupling of each run by the reconstruction error measured on it.

Inverting a block divides rounding errors by g, so that a small coupling (close to the source) needs a short run, and a
long run a large coupling or anchors: inputs that are kept. No estimate is trusted: what counts is the error found by
running a layer forward and back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from petra_zoo.converters.reconstruction import CoupledRun, InversionTrial, describe, with_calls
from petra_zoo.converters.runs import BlockRun, Call, calls_of
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


def couple_runs(
    model: nn.Module,
    runs: Sequence[BlockRun],
    images: Tensor,
    coupling: Sequence[float | Literal["auto"]],
    purpose: Purpose,
    tolerance: float,
) -> list[CoupledRun]:
    """Gives every run of an unconverted model its coupling, anchors and scaled branches, in place.

    Per run the first candidate whose error stays within `tolerance` without anchors is taken; where none does, the
    last one with the widest spacing of anchors that does. Each run is measured behind the converted ones before it,
    with batch statistics (training) and with running ones (fine-tuning with frozen norms); the larger error counts.

    Args:
        model: as a family makes it, coupling 0.
        runs: the model's.
        images: [B, C, H, W], normalised images or noise.
        coupling: one per run.
        purpose: what 'auto' should do with short runs.
        tolerance: the largest relative error of a reconstructed input.

    Returns:
        The runs as they are now.

    Raises:
        UserError: activations are not finite, or a run's branches cannot be scaled.
    """
    coupled = []
    for i, (run, wanted) in enumerate(zip(runs, coupling, strict=True)):
        (calls,) = calls_of(model, [run], images, behind=runs[:i])
        coupled.append(_choose(run, calls, candidates(wanted, run.blocks, purpose), tolerance))
    calls_of(model, [], images, behind=runs)
    return coupled


def anchor_runs(model: nn.Module, runs: Sequence[BlockRun], images: Tensor, tolerance: float) -> list[CoupledRun]:
    """Anchors every run anew, as widely as `tolerance` allows (not at all where it can), its coupling as it is.

    For a model whose statistics have changed since its couplings were chosen. Anchors do not change its function.

    Args:
        model: converted.
        runs: the model's.
        images: [B, C, H, W].
        tolerance: the largest relative error of a reconstructed input.
    """
    return [_anchor(run, InversionTrial(run, calls), tolerance) for run, calls in with_calls(model, runs, images)]


def _choose(run: BlockRun, calls: Sequence[Call], couplings: Sequence[float], tolerance: float) -> CoupledRun:
    for g in couplings:
        run.couple(g)
        run.anchor_every = 0
        trial = InversionTrial(run, calls)
        error = trial.error(tolerance)
        if error <= tolerance:
            return describe(run, error)
    return _anchor(run, trial, tolerance)


def _anchor(run: BlockRun, trial: InversionTrial, tolerance: float) -> CoupledRun:
    """The widest spacing whose error passes; the narrowest where none does."""
    for anchor_every in (0, *reversed(range(1, run.blocks))):
        run.anchor_every = anchor_every
        error = trial.error(tolerance)
        if error <= tolerance:
            break
    return describe(run, error)
