"""From a trained network to a reversible one that predicts (almost) the same."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Literal, TypedDict

from torch import nn

from petra_zoo.converters.calibration import Batches, image_batches, noise
from petra_zoo.converters.checks import check_source
from petra_zoo.converters.choose import Limits, Purpose, anchor_runs
from petra_zoo.converters.families import family_for
from petra_zoo.converters.inverses import Attempt, choose_inverse
from petra_zoo.converters.reconstruction import MEASURED_IMAGES
from petra_zoo.converters.reestimation import has_statistics, re_estimate
from petra_zoo.converters.source import load_source
from petra_zoo.errors import UserError
from petra_zoo.models.reversible_sequential import Units

TOLERANCE = 1e-4  # relative error of a reconstructed input


class ConversionOptions(TypedDict, total=False):
    """What to aim for; see `convert`."""

    coupling: Literal["auto"] | float | Sequence[float]
    purpose: Purpose
    tolerance: float
    exact: bool | Literal["auto"] | None
    units: Units


def convert(
    source: str | nn.Module,
    *,
    coupling: Literal["auto"] | float | Sequence[float] = "auto",
    purpose: Purpose = "one-device",
    tolerance: float = TOLERANCE,
    calibration: Batches | None = None,
    exact: bool | Literal["auto"] | None = None,
    units: Units = "auto",
) -> nn.Module:
    """Converts a trained network; the source is left as it is.

    Where a run's coupling g is above 0, its branches get 1 + g times their strength and its inverse is measured:
    anchors are set where the error would exceed `tolerance` without them. With `calibration`, batch-norm statistics are
    then estimated anew, and the anchors set again for the errors that the new statistics give. With g = 0 everywhere
    the result computes what the source computes, to the bit.

    Args:
        source: a network that some family takes (`petra_zoo.converters.families`): timm's ResNets and transformers, any
            network with a chain of blocks that keep their shape; or what `load_source` takes (a timm name: its
            pretrained weights).
        coupling: g of all runs or one per run (a ResNet's layers), multiples of 1/256 in [0, 1]; 'auto': per run the
            smallest of 1/16, 1/8, 1/4, 1/2 whose error passes, else 1/2 with anchors. Networks without batch norms
            rather take anchors four blocks apart or more than a larger coupling.
        purpose: 'one-device': 'auto' leaves runs of up to 2 blocks at 0, where nothing would be saved; 'petra': every
            run gets an inverse.
        tolerance: the largest relative error of a reconstructed input, in the weights' own precision.
        calibration: normalised images [B, C, H, W], or batches of them, such as a loader (labels are not looked at);
            the first ones are also what errors are measured on, noise without them.
        exact: round the branches to a grid, so that reconstruction is exact, and below g = 1 keep the bits that a block
            drops instead of anchors (g must be 1, 1/2, ...); for one device, and at g = 1 for PETRA too. 'auto': as
            memory and fidelity say (`petra_zoo.converters.inverses`). None: False for ResNets, 'auto' for others.
            Without effect where no run is reconstructed.
        units: 'block', also 'auto': a unit is a block, coupled as a whole. 'branch': attention and MLP of a
            transformer's blocks are units of their own, which peak lower and need twice as many inverses.

    Returns:
        The reversible network, on the source's device and in its mode. Where the source came from
        `timm.create_model`, timm can save and load it under the name of a network of the zoo.

    Raises:
        UserError: the source has no reversible form or is one already, its weights are not finite, an argument is out
            of range, its blocks are not known by their branches, or 'auto' finds nothing that would pay.
    """
    network = load_source(source) if isinstance(source, str) else source
    if not tolerance > 0.0:
        raise UserError(f"tolerance={tolerance:g}: expected a relative error above 0, such as 1e-4")
    batches = image_batches(calibration if calibration is not None else ())
    first = next(batches, None)
    if first is None and calibration is not None:
        raise UserError("there is not one batch of images to calibrate on")
    images = noise(network) if first is None else first[:MEASURED_IMAGES]
    family = family_for(check_source(network, images), images)
    limits = Limits(tolerance, family.closest_anchors, family.largest_drift)
    coupled = choose_inverse(Attempt(network, family, coupling, purpose, limits, images, units), exact)
    model, runs = coupled.model, coupled.runs
    if any(run.g() > 0.0 for run in runs) and first is not None and has_statistics(model):
        re_estimate(model, chain([first], batches), network)
        anchor_runs(model, runs, images, tolerance)  # other statistics, other errors
    family.identify(model, coupled.exact_bits)
    return model
