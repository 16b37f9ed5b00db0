"""What coupling a plain transformer's weights get while they load.

Whole blocks, scaled by the gain 1 + g, predict what the source predicts without any statistics to estimate anew. A
coupling of 1/4 can be inverted over six blocks in float32: from one kept pair of streams to the next the error grows by
1/g per block. Larger couplings need fewer of them, and predict less like the source.

With exact streams the coupling is 1/16, which predicts more like the source and stores less: 4 bits per element and
block. It is not what weights come with, for a pipeline whose parameters change between a forward and its backward can
use no such bits, couplings that move cannot either, and nobody knows the range of streams before they are seen.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from petra_zoo.models.transformer import ReversibleTransformer

COUPLING, EXACT_COUPLING = 1 / 4, 1 / 16
_BITS_LOST = 12  # between two anchors: log2(1/g) per block


def transformer_anchors(blocks: int, g: float) -> int:
    """After how many blocks the streams are kept, so that a run can be inverted in float32; 0: never.

    Args:
        blocks: of the run.
        g: its coupling.
    """
    if g in (0.0, 1.0):
        return 0
    spacing = max(1, math.floor(_BITS_LOST / -math.log2(g)))
    return spacing if blocks > spacing else 0


def couple_transformer(weights: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A plain transformer's state dict as a coupled one, which the model gets anchors for.

    The coupling is 1/4, with exact streams 1/16, or what the model was built with; the gain 1 + g, or what it was built
    with.

    Args:
        weights: left as they are; those of a reversible network are given back.
        model: that they are for.
    """
    assert isinstance(model, ReversibleTransformer)
    if "blocks.coupling" in weights:
        return weights
    g, s = _chosen(model)
    return {**weights, "blocks.coupling": torch.tensor(g), "blocks.gain": torch.tensor(s)}


def couple_as_loaded(model: ReversibleTransformer) -> None:
    """Gives a transformer the coupling, gain and anchors that its pretrained weights come with."""
    g, s = _chosen(model)
    model.coupled_blocks().set_coupling(g)
    model.coupled_blocks().set_gain(s)


def _chosen(model: ReversibleTransformer) -> tuple[float, float]:
    blocks = model.coupled_blocks()
    g = blocks.asked_for
    if g is None:
        g = COUPLING if blocks.grid == 0.0 else EXACT_COUPLING
    if not model.anchors_chosen and blocks.grid == 0.0:  # on a grid the inverse is exact
        model.set_anchors([transformer_anchors(len(blocks), g)])
    asked = blocks.asked_for_gain
    return g, 1.0 + g if asked is None else asked
