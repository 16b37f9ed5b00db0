"""The published weights of reversible vision transformers (Rev-ViT, pyslowfast), by their names there.

A published file is a pickled dictionary whose ``model_state`` holds the weights. Its blocks are
``rev_backbone.layers.N``, with the branches F (attention; query, key and value are three layers) and G (MLP).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor

_STATE = "model_state"
_BLOCK = "rev_backbone.layers."
_NAMES = (
    (re.compile(r"^rev_backbone\.layers\."), "blocks."),
    (re.compile(r"\.F\.norm\."), ".norm1."),
    (re.compile(r"\.G\.norm\."), ".norm2."),
    (re.compile(r"\.F\.attn\."), ".attn."),
    (re.compile(r"\.G\.mlp\."), ".mlp."),
    (re.compile(r"^head\.projection\."), "head."),
)
_QUERY = re.compile(r"(.*\.attn\.)q(\.weight|\.bias)")


def is_published(weights: Mapping[str, Tensor]) -> bool:
    """Whether a file's content, or the state dict in it, has the published names."""
    return _STATE in weights or any(name.startswith(_BLOCK) for name in weights)


def from_published(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A published file's weights under the zoo's names; those that have them already as they are.

    Args:
        weights: a state dict, or the dictionary of a published file.
    """
    nested: Mapping[str, Tensor] | Tensor = weights.get(_STATE, weights)
    found = {_renamed(name): value for name, value in dict(nested).items()}
    for name in list(found):
        if query := _QUERY.fullmatch(name):
            before, after = query.groups()
            found[f"{before}qkv{after}"] = torch.cat([found.pop(f"{before}{part}{after}") for part in "qkv"])
    return found


def load_filter(weights: dict[str, Tensor], model: VisionTransformer) -> dict[str, Tensor]:
    """timm's `pretrained_filter_fn`: published names become ours, embeddings are fitted to the model's image size."""
    found: dict[str, Tensor] = checkpoint_filter_fn(from_published(weights), model)
    return found


def _renamed(name: str) -> str:
    for pattern, ours in _NAMES:
        name = pattern.sub(ours, name)
    return name
