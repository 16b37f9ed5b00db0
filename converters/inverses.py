"""Anchors or bits: the two ways in which a run below coupling 1 can be inverted well, and which one a network gets.

Anchors keep both streams every few blocks. Bits, on a grid, keep of each element the few that a block drops: the
inverse is exact, so that the smallest coupling will do. Both are tried where nobody asks for one, and compared by the
peak of a training step and by how far the logits are from the source's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from petra_zoo.converters.choose import Limits, Purpose, couple_runs
from petra_zoo.converters.families import NetworkFamily, name_of
from petra_zoo.converters.identity import DEFAULT_EXACT_BITS
from petra_zoo.converters.reconstruction import CoupledRun, largest_stream
from petra_zoo.converters.reestimation import batch_statistics
from petra_zoo.converters.runs import BlockRun, relative_error
from petra_zoo.errors import Failure, UserError
from petra_zoo.models.resnet_weights import SHORT_RUN
from petra_zoo.models.reversible_sequential import Units
from petra_zoo.models.run_buffers import check_coupling
from petra_zoo.models.training_memory import step_bytes

_RANGE_BITS, _HEADROOM = 24, 4.0  # of float32 streams, and how much larger than what was measured they may get
ABOUT_THE_SAME = 0.1  # parts of the peak by which two ways may differ before memory decides


@dataclass(frozen=True)
class Attempt:
    """A conversion before its inverse is chosen.

    Attributes:
        network: the source.
        family: of it.
        coupling: what is asked for.
        purpose: see `couple_runs`.
        limits: likewise.
        images: [B, C, H, W], which it is measured on.
        units: whole blocks, or their branches.
    """

    network: nn.Module
    family: NetworkFamily
    coupling: Literal["auto"] | float | Sequence[float]
    purpose: Purpose
    limits: Limits
    images: Tensor
    units: Units = "auto"


@dataclass(frozen=True)
class Coupled:
    """A coupled network.

    Attributes:
        model: the network.
        runs: its runs.
        exact_bits: its streams lie on the grid 2**-exact_bits; None: on none.
    """

    model: nn.Module
    runs: Sequence[BlockRun]
    exact_bits: int | None


def choose_inverse(attempt: Attempt, exact: bool | Literal["auto"] | None) -> Coupled:
    """Couples a copy of the source with anchors, with bits, or with what is better.

    Raises:
        UserError: see `couple_runs`; bits are asked for where they cannot be had; or 'auto' finds nothing that pays.
    """
    if exact is None:
        exact = attempt.family.exact
    if exact is True:
        _check_exact(attempt)
    if exact != "auto":
        return _couple(attempt, exact)
    if attempt.purpose == "petra":
        return _couple(attempt, exact=False)
    try:
        anchored = _couple(attempt, exact=False)
    except UserError as refused:
        return _with_bits(attempt, refused)
    if not any(0.0 < run.g() < 1.0 for run in anchored.runs):
        return anchored
    try:
        return _better(attempt, anchored, _couple(attempt, exact=True))
    except (UserError, Failure):  # a coupling that is no 2**-m, values beyond the grid, kernels that differ
        return anchored


def _with_bits(attempt: Attempt, refused: UserError) -> Coupled:
    """What anchors could not give: they need a larger coupling, which moves outputs further."""
    try:
        return _couple(attempt, exact=True)
    except (UserError, Failure):
        raise refused from None


def _check_exact(attempt: Attempt) -> None:
    couplings = [attempt.coupling] if isinstance(attempt.coupling, int | float | str) else attempt.coupling
    inexact = [g for g in couplings if isinstance(g, int | float) and 0.0 < g < 1.0]
    if attempt.purpose == "petra" and inexact:
        raise UserError(
            f"exact inversion at coupling {inexact[0]:g} is for one device: under PETRA the parameters change between "
            "a block's forward and its inverse; use coupling 1, or anchors (leave exact out)"
        )


def _couple(attempt: Attempt, exact: bool) -> Coupled:
    model = attempt.family.couple(attempt.network, attempt.images[:1])
    attempt.family.use_units(model, attempt.units)
    runs = attempt.family.runs(model)
    wanted = _per_run(attempt.coupling, len(runs), attempt.family)
    exact_bits = _exact_bits(model, runs, attempt.images) if exact else None
    _set_grid(runs, exact_bits)
    found = couple_runs(model, runs, attempt.images, wanted, attempt.purpose, attempt.limits)
    if not any(run.g > 0.0 for run in found):
        if attempt.coupling == "auto" and attempt.family.largest_drift is not None:
            raise UserError(_pays_nothing(name_of(attempt.network), found))
        exact_bits = None  # nothing is reconstructed: keep the source's function to the bit
        _set_grid(runs, exact_bits)
    return Coupled(model, runs, exact_bits)


def _exact_bits(model: nn.Module, runs: Sequence[BlockRun], images: Tensor) -> int:
    """The finest grid, down to the models' default, on which the streams of an uncoupled model have room."""
    largest = largest_stream(model, runs, images)
    return min(DEFAULT_EXACT_BITS, math.floor(_RANGE_BITS - math.log2(max(1.0, _HEADROOM * min(largest, 1e9)))))


def _set_grid(runs: Sequence[BlockRun], exact_bits: int | None) -> None:
    for run in runs:
        run.container.grid = 0.0 if exact_bits is None else 2.0**-exact_bits


def _better(attempt: Attempt, anchored: Coupled, with_bits: Coupled) -> Coupled:
    """The one whose training step peaks lower; where they hardly differ, the one that is closer to the source."""
    size = attempt.images.shape[1:]
    try:
        peaks = [step_bytes(way.model, (size[0], size[1], size[2])).peak for way in (anchored, with_bits)]
    except (NotImplementedError, RuntimeError):  # it looks at values, which meta tensors have not
        peaks = [0, 0]
    if abs(peaks[0] - peaks[1]) > ABOUT_THE_SAME * min(peaks):
        return anchored if peaks[0] < peaks[1] else with_bits
    return min(anchored, with_bits, key=lambda way: drift_of(attempt.network, way.model, attempt.images))


def drift_of(network: nn.Module, model: nn.Module, images: Tensor) -> float:
    """How far a model's outputs for images [B, C, H, W] are from the network's, in parts of their size; eval mode."""
    like = next(network.parameters())
    images = images.to(like.device, like.dtype)
    with torch.no_grad(), batch_statistics(network, False), batch_statistics(model, False):
        return relative_error(model(images), network(images))


def _per_run(
    coupling: Literal["auto"] | float | Sequence[float], runs: int, family: NetworkFamily
) -> list[float | Literal["auto"]]:
    if coupling == "auto":
        return ["auto"] * runs
    values = [coupling] * runs if isinstance(coupling, int | float) else list(coupling)
    if len(values) != runs:
        raise UserError(f"coupling is 'auto', one number or {runs}, one per {family.part}; got {len(values)}")
    if not all(isinstance(g, int | float) for g in values):
        raise UserError(f"coupling={coupling!r}: expected 'auto' or multiples of 1/256 between 0 and 1")
    return [check_coupling(g) for g in values]


def _pays_nothing(name: str, runs: Sequence[CoupledRun]) -> str:
    """Why no run of a network has an inverse though nobody has asked for that."""
    long = [run.layer for run in runs if run.blocks > SHORT_RUN]
    if not long:
        return (
            f"{name} has no {SHORT_RUN + 1} blocks of one shape in a row: on one device an inverse would save nothing; "
            "--for petra makes every run reversible"
        )
    return (
        f"{name} would become another network: what {', '.join(long)} gives moves too far, its blocks are not near the "
        "identity; --coupling 0.5, for instance, converts it all the same"
    )
