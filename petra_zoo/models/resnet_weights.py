"""timm's ResNet weights in the reversible ResNets: which there are, and how they become coupled while they load.

A run gets its coupling by its length alone. g = 1/8 keeps predictions close without estimating batch-norm statistics
anew (nobody has images at hand while weights load), and can be inverted over four blocks with a relative error below
1e-4 in float32 (tests/models/test_resnet_weights.py measures it). Longer runs keep their streams every four blocks,
and runs of one or two blocks, where an inverse would save nothing, stay as they are.
`petra_zoo.converters.conversion` chooses by measuring instead, and estimates statistics.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from petra_zoo.models.branch_scaling import branch_scales
from petra_zoo.models.coupled_layer import CoupledLayer

COUPLING = 1 / 8
SHORT_RUN = 2  # blocks; on one device such a run saves nothing over recomputing each block from its input
_BITS_LOST, _LONGEST = 13, 6  # between two anchors: log2(1 + 1/g) per block, and how many blocks


def run_coupling(blocks: int) -> float:
    """The coupling of a run of so many reversible blocks, where neither checkpoint nor caller names one."""
    return COUPLING if blocks > SHORT_RUN else 0.0


def run_anchors(blocks: int, g: float) -> int:
    """After how many blocks of a run its streams are kept, so that it can be inverted in float32; 0: never.

    Inverting a block loses about log2(1 + 1/g) bits of the streams where its branch is as strong as its shortcut.
    """
    if g == 0.0:
        return 0
    spacing = max(1, min(_LONGEST, math.floor(_BITS_LOST / math.log2(1 + 1 / g))))
    return spacing if blocks > spacing else 0


class Chosen(NamedTuple):
    """What the layers of a network get where nobody names it: values, one per layer.

    Attributes:
        couplings: g.
        anchors: after how many blocks of its run a layer's streams are kept; 0: never.
    """

    couplings: list[float]
    anchors: list[int]


def choose_couplings(layers: Mapping[str, CoupledLayer]) -> Chosen:
    """Couplings and anchors for a ResNet's weights.

    Args:
        layers: of the network, by name; where one was built with a coupling, that is taken.
    """
    blocks = [len(layer.in_run()) for layer in layers.values()]
    asked = [layer.asked_for for layer in layers.values()]
    couplings = [run_coupling(n) if g is None else g for n, g in zip(blocks, asked, strict=True)]
    return Chosen(couplings, [run_anchors(n, g) for n, g in zip(blocks, couplings, strict=True)])


def has_couplings(weights: Mapping[str, Tensor], layers: Mapping[str, CoupledLayer]) -> bool:
    """Whether a state dict is that of a reversible network; else it is a plain ResNet's."""
    return any(f"{name}.coupling" in weights for name in layers)


def couple_weights(
    weights: Mapping[str, Tensor], layers: Mapping[str, CoupledLayer], couplings: Sequence[float]
) -> dict[str, Tensor]:
    """A plain ResNet's state dict as a coupled one: branches scaled by 1 + g, coupling values added.

    Args:
        weights: left as they are.
        layers: of the network they are for, by name.
        couplings: g of each.

    Raises:
        UserError: a branch cannot be scaled.
    """
    coupled = dict(weights)
    for (name, layer), g in zip(layers.items(), couplings, strict=True):
        coupled[f"{name}.coupling"] = torch.tensor(g)
        for key, factor in (branch_scales(layer, g) if g > 0.0 else {}).items():
            value = coupled.get(f"{name}.{key}")
            if value is not None:  # else loading reports it as missing
                exact = value.to(torch.promote_types(value.dtype, torch.float32))
                coupled[f"{name}.{key}"] = exact * factor
    return coupled
