"""What coupling a plain transformer's weights get while they load.

Whole blocks, scaled by the gain 1 + g, predict what the source predicts without any statistics to estimate anew. A
coupling of 1/4 can be inverted over six blocks in float32 (`inversions_in_a_row`); larger ones over more, and they
predict less like the source.

With exact streams the coupling is 1/16, which predicts more like the source and stores less: 4 bits per element and
block. It is not what weights come with, for a pipeline whose parameters change between a forward and its backward can
use no such bits, couplings that move cannot either, and nobody knows the range of streams before they are seen.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from petra_zoo.models.transformer import ReversibleTransformer

COUPLING, EXACT_COUPLING = 1 / 4, 1 / 16


def couple_transformer(weights: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A plain transformer's state dict as a coupled one.

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
    """Gives a transformer the coupling and gain that its pretrained weights come with."""
    g, s = _chosen(model)
    model.coupled_blocks().set_coupling(g)
    model.coupled_blocks().set_gain(s)


def _chosen(model: ReversibleTransformer) -> tuple[float, float]:
    blocks = model.coupled_blocks()
    g = blocks.asked_for
    if g is None:
        g = COUPLING if blocks.grid == 0.0 else EXACT_COUPLING
    asked = blocks.asked_for_gain
    return g, 1.0 + g if asked is None else asked
