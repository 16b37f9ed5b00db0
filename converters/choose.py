"""Choosing the coupling of each run by the reconstruction error measured on it.

Inverting a block divides rounding errors by g, so that a small coupling (close to the source) needs a short run, and a
long run a large coupling or anchors: inputs that are kept. No estimate is trusted: what counts is the error found by
running a layer forward and back.

How far a coupled run is from the source's grows with its coupling. Batch-norm statistics that are estimated anew bring
it back; where there are none, anchors that are not too close are the better price (`Limits.closest_anchors`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from petra_zoo.converters.reconstruction import CoupledRun, InversionTrial, describe, with_calls
from petra_zoo.converters.runs import BlockRun, Call, calls_of, outputs_of, relative_error
from petra_zoo.models.resnet_weights import SHORT_RUN

Purpose = Literal["one-device", "petra"]
CANDIDATES = (1 / 16, 1 / 8, 1 / 4, 1 / 2)


@dataclass(frozen=True)
class Limits:
    """What a run must keep within.

    Attributes:
        tolerance: the largest relative error of a reconstructed input.
        closest_anchors: 'auto' takes a coupling whose inverse needs anchors if they are at least so many blocks apart;
            None: only where no coupling does without.
        largest_drift: 'auto' leaves a run as it is whose outputs would move by more than this part of their size; None:
            by whatever.
    """

    tolerance: float
    closest_anchors: int | None = None
    largest_drift: float | None = None


def candidates(coupling: float | Literal["auto"], blocks: int, purpose: Purpose, exact: bool) -> Sequence[float]:
    """The couplings to try for a run of `blocks` blocks, in order of preference; `exact`: its streams lie on a grid."""
    if coupling != "auto":
        return (coupling,)
    if blocks == 0 or (purpose == "one-device" and blocks <= SHORT_RUN):
        return (0.0,)
    # Under PETRA parameters change between the forward and the inverse, which below 1 is as exact as they are alike.
    return (1.0,) if exact and purpose == "petra" else CANDIDATES


def couple_runs(
    model: nn.Module,
    runs: Sequence[BlockRun],
    images: Tensor,
    coupling: Sequence[float | Literal["auto"]],
    purpose: Purpose,
    limits: Limits,
) -> list[CoupledRun]:
    """Gives every run of an unconverted model its coupling, anchors and scaled branches, in place.

    Per run the first candidate whose error stays within the tolerance without anchors, or with anchors far enough apart
    (`limits`), is taken; where none does, the last one with the widest spacing of anchors that does. Each run is
    measured behind the converted ones before it, with batch statistics (training) and with running ones (fine-tuning
    with frozen norms); the larger error counts.

    Args:
        model: as a family makes it, coupling 0.
        runs: the model's.
        images: [B, C, H, W], normalised images or noise.
        coupling: one per run.
        purpose: what 'auto' should do with short runs.
        limits: what a run must keep within.

    Returns:
        The runs as they are now.

    Raises:
        UserError: activations are not finite, or a run's branches cannot be scaled.
    """
    coupled = []
    for i, (run, wanted) in enumerate(zip(runs, coupling, strict=True)):
        (calls,) = calls_of(model, [run], images, behind=runs[:i])
        couplings = candidates(wanted, run.blocks, purpose, run.container.grid > 0.0) if calls else (0.0,)
        before = outputs_of(run, calls) if wanted == "auto" and limits.largest_drift is not None else []
        chosen = _choose(run, calls, couplings, limits)
        if before and _drift(run, calls, before) > (limits.largest_drift or 0.0):
            chosen = _choose(run, calls, (0.0,), limits)
        coupled.append(chosen)
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


def _choose(run: BlockRun, calls: Sequence[Call], couplings: Sequence[float], limits: Limits) -> CoupledRun:
    closest = limits.closest_anchors or run.blocks
    for g in couplings:
        run.couple(g)
        trial = InversionTrial(run, calls)
        found = _anchor(run, trial, limits.tolerance, closest)
        # A run keeps its streams more often by itself where its coupling needs it, which costs the memory of anchors.
        if found.error <= limits.tolerance and (found.anchor_every == 0 or found.anchor_every >= closest):
            return found
    return _anchor(run, trial, limits.tolerance)


def _anchor(run: BlockRun, trial: InversionTrial, tolerance: float, closest: int = 1) -> CoupledRun:
    """The widest spacing, down to the closest, whose error passes; the closest where none does."""
    for anchor_every in (0, *reversed(range(closest, run.blocks))):
        run.anchor_every = anchor_every
        error = trial.error(tolerance)
        if error <= tolerance:
            break
    return describe(run, error)


def _drift(run: BlockRun, calls: Sequence[Call], before: Sequence[Tensor]) -> float:
    """How far a run's outputs have moved, in parts of their size."""
    return max(relative_error(now, then) for now, then in zip(outputs_of(run, calls), before, strict=True))
