"""From a trained network to a reversible one that predicts (almost) the same."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Literal, TypedDict

from torch import nn

from petra_zoo.converters.calibration import Batches, image_batches, noise
from petra_zoo.converters.checks import check_source
from petra_zoo.converters.choose import Limits, Purpose, anchor_runs, couple_runs
from petra_zoo.converters.families import NetworkFamily, family_for, name_of
from petra_zoo.converters.reconstruction import MEASURED_IMAGES, CoupledRun
from petra_zoo.converters.reestimation import re_estimate
from petra_zoo.converters.runs import BlockRun
from petra_zoo.converters.source import load_source
from petra_zoo.errors import UserError
from petra_zoo.models.resnet_weights import SHORT_RUN
from petra_zoo.models.run_buffers import check_coupling

EXACT_BITS = 12  # the models' default grid
TOLERANCE = 1e-4  # relative error of a reconstructed input


class ConversionOptions(TypedDict, total=False):
    """What to aim for; see `convert`."""

    coupling: Literal["auto"] | float | Sequence[float]
    purpose: Purpose
    tolerance: float
    exact: bool


def convert(
    source: str | nn.Module,
    *,
    coupling: Literal["auto"] | float | Sequence[float] = "auto",
    purpose: Purpose = "one-device",
    tolerance: float = TOLERANCE,
    calibration: Batches | None = None,
    exact: bool = False,
) -> nn.Module:
    """Converts a trained network; the source is left as it is.

    Where a run's coupling g is above 0, its branches get 1 + g times their strength and its inverse is measured:
    anchors are set where the error would exceed `tolerance` without them. With `calibration`, batch-norm statistics are
    then estimated anew, and the anchors set again for the errors that the new statistics give. With g = 0 everywhere
    the result computes what the source computes, to the bit.

    Args:
        source: a network that some family takes (`petra_zoo.converters.families`), such as a timm ResNet of BasicBlocks
            or Bottlenecks, or what `load_source` takes (a timm name: its pretrained weights).
        coupling: g of all runs or one per run (a ResNet's layers), multiples of 1/256 in [0, 1]; 'auto': per run the
            smallest of 1/16, 1/8, 1/4, 1/2 whose error passes, else 1/2 with anchors.
        purpose: 'one-device': 'auto' leaves runs of up to 2 blocks at 0, where nothing would be saved; 'petra': every
            run gets an inverse.
        tolerance: the largest relative error of a reconstructed input, in the weights' own precision.
        calibration: normalised images [B, C, H, W], or batches of them, such as a loader (labels are not looked at);
            the first ones are also what errors are measured on, noise without them.
        exact: round the branches to a grid, so that reconstruction is exact at g = 1 (see `PetraRevNet`); without
            effect where no run is reconstructed.

    Returns:
        The reversible network, on the source's device and in its mode. Where the source came from
        `timm.create_model`, timm can save and load it under the name of a network of the zoo.

    Raises:
        UserError: the source has no reversible form or is one already, its weights are not finite, or an argument is
            out of range.
    """
    network = load_source(source) if isinstance(source, str) else check_source(source)
    if not tolerance > 0.0:
        raise UserError(f"tolerance={tolerance:g}: expected a relative error above 0, such as 1e-4")
    family = family_for(network)
    model = family.couple(network)
    runs = family.runs(model)
    wanted = _per_run(coupling, len(runs), family)
    _set_grid(runs, exact)
    batches = image_batches(calibration if calibration is not None else ())
    first = next(batches, None)
    if first is None and calibration is not None:
        raise UserError("there is not one batch of images to calibrate on")
    images = noise(model) if first is None else first[:MEASURED_IMAGES]
    limits = Limits(tolerance, family.closest_anchors, family.largest_drift)
    coupled = couple_runs(model, runs, images, wanted, purpose, limits)
    if not any(run.g > 0.0 for run in coupled):
        if coupling == "auto" and family.largest_drift is not None:
            raise UserError(_pays_nothing(name_of(network), coupled))
        exact = False  # nothing is reconstructed: keep the source's function to the bit
        _set_grid(runs, exact)
    elif first is not None:
        re_estimate(model, chain([first], batches), network)
        anchor_runs(model, runs, images, tolerance)  # other statistics, other errors
    family.identify(model, exact)
    return model


def _set_grid(runs: Sequence[BlockRun], exact: bool) -> None:
    for run in runs:
        run.container.grid = 2.0**-EXACT_BITS if exact else 0.0


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
