"""Layers among a ResNet's constructor arguments, as classes and as words that a checkpoint's config.json can hold.

timm hands `nn.AvgPool2d` or a partial squeeze-and-excite to its ResNets; saved models need them by name.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from timm.layers import BlurPool2d, SEModule, get_attn
from timm.models.resnet import BasicBlock, Bottleneck
from torch import nn

Argument = Any  # what timm's constructors and configurations take: numbers, words, classes of layers, partials
Arguments = dict[str, Argument]

_BLOCKS = {"basic": BasicBlock, "bottleneck": Bottleneck}
_ANTI_ALIASING = {"avg": nn.AvgPool2d, "blur": BlurPool2d}


def to_words(arguments: Arguments) -> Arguments:
    """Constructor arguments with the layers that timm's ResNets use replaced by words; others stay as they are.

    ``block``, where there is one per layer, becomes a list of 'basic' and 'bottleneck', ``aa_layer`` becomes 'avg' or
    'blur', a partial SE gate in ``block_args`` ``{"type": "se", ...}``.
    """
    out = dict(arguments)
    if isinstance(blocks := out.get("block"), list | tuple):
        names = {block: word for word, block in _BLOCKS.items()}
        out["block"] = [names.get(block, block) for block in blocks]
    for word, layer in _ANTI_ALIASING.items():
        if out.get("aa_layer") is layer:
            out["aa_layer"] = word
    gate = (out.get("block_args") or {}).get("attn_layer")
    if isinstance(gate, partial) and gate.func is SEModule and not gate.args:
        out["block_args"] = {**out["block_args"], "attn_layer": {"type": "se", **gate.keywords}}
    return out


def from_words(arguments: Arguments) -> Arguments:
    """The inverse of `to_words`.

    Raises:
        ValueError: a block or an anti-aliasing layer of another name.
    """
    out = dict(arguments)
    if isinstance(blocks := out.get("block"), list | tuple):
        if unknown := [block for block in blocks if block not in _BLOCKS and isinstance(block, str)]:
            raise ValueError(f"block is {' or '.join(map(repr, _BLOCKS))}, not {unknown[0]!r}")
        out["block"] = [_BLOCKS.get(block, block) for block in blocks]
    if isinstance(word := out.get("aa_layer"), str):
        if word not in _ANTI_ALIASING:
            raise ValueError(f"aa_layer is {' or '.join(map(repr, _ANTI_ALIASING))}, not {word!r}")
        out["aa_layer"] = _ANTI_ALIASING[word]
    gate = (out.get("block_args") or {}).get("attn_layer")
    if isinstance(gate, dict):
        options = dict(gate)
        out["block_args"] = {**out["block_args"], "attn_layer": partial(get_attn(options.pop("type")), **options)}
    return out
