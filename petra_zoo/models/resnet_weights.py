"""timm's ResNet weights in the reversible ResNets: which there are, and how they become coupled while they load.

A run gets its coupling by its length alone. g = 1/8 keeps predictions close without estimating batch-norm statistics
anew (nobody has images at hand while weights load), and can be inverted over four blocks with a relative error below
1e-4 in float32 (tests/models/test_resnet_weights.py measures it). Longer runs keep their streams every four blocks,
and runs of one or two blocks, where an inverse would save nothing, stay as they are.
`petra_zoo.converters.conversion` chooses by measuring instead, and estimates statistics.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from timm.models import PretrainedCfg, get_arch_pretrained_cfgs
from torch import Tensor

from petra_zoo.models.branch_scaling import branch_scales

if TYPE_CHECKING:
    from petra_zoo.models.petra_revnet import PetraRevNet

COUPLING = 1 / 8
SHORT_RUN = 2  # blocks; on one device such a run saves nothing over recomputing each block from its input
_BITS_LOST, _LONGEST = 13, 6  # between two anchors: log2(1 + 1/g) per block, and how many blocks


def resnet_cfgs(name: str, resnet: str) -> dict[str, PretrainedCfg]:
    """All tags of a timm ResNet's weights for the reversible network of the same parameters, the default first.

    Preprocessing, licence and origin are timm's; the weights are timm's own files on the Hub.
    """
    cfgs = get_arch_pretrained_cfgs(resnet)
    return {
        key.replace(resnet, name, 1): replace(cfg, url=None, architecture=None, tag=None) for key, cfg in cfgs.items()
    }


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


def couple_weights(weights: dict[str, Tensor], model: PetraRevNet, *, anchor: bool = True) -> dict[str, Tensor]:
    """A plain ResNet's state dict as a coupled one: branches scaled by 1 + g, coupling values added.

    Weights that have coupling values already are returned as they are.

    Args:
        weights: left as they are.
        model: what they are for; where it was built with couplings, these are taken. It gets the anchors that long
            runs need.
        anchor: whether it does.

    Raises:
        UserError: a branch cannot be scaled.
    """
    layers = [name for name, _ in model.named_children() if name.startswith("layer")]
    if any(f"{name}.coupling" in weights for name in layers):
        return weights
    coupled = dict(weights)
    anchors = []
    for name in layers:
        layer: Any = model.get_submodule(name)
        blocks = len(layer.in_run())
        g = run_coupling(blocks) if layer.asked_for is None else layer.asked_for
        coupled[f"{name}.coupling"] = torch.tensor(g)
        for key, factor in (branch_scales(layer, g) if g > 0.0 else {}).items():
            value = coupled.get(f"{name}.{key}")
            if value is not None:  # else loading reports it as missing
                exact = value.to(torch.promote_types(value.dtype, torch.float32))
                coupled[f"{name}.{key}"] = exact * factor
        if anchor:
            layer.anchor_every = run_anchors(blocks, g)
        anchors.append(layer.anchor_every)
    if any(anchors):
        holder: Any = model
        holder._model_args = {**getattr(model, "_model_args", {}), "anchor_every": anchors}  # a saved copy's, too
    return coupled
