"""Activation memory of a training step: of a source, with timm's checkpointing too, and of the converted network."""

from __future__ import annotations

import copy
from typing import Any

import torch
from timm.models.resnet import ResNet
from torch import nn

from petra_zoo.models import PetraRevNet
from petra_zoo.reversible import LiveBytes


def activation_memory(source: ResNet, converted: PetraRevNet, size: tuple[int, int, int]) -> dict[str, int]:
    """Bytes per image that are alive between the forward and the backward pass of a training step.

    Counted, not estimated: what a step with 4 images [C, H, W] of `size` keeps more than one with 2. The backward pass
    needs some more for a while, the activations of the block it is at. Both networks stay as they are.

    Returns:
        'source'; 'source, checkpointed' (`set_grad_checkpointing`: every block recomputed); 'converted'.
    """
    checkpointed: Any = copy.deepcopy(source)
    checkpointed.set_grad_checkpointing()
    networks = {"source": source, "source, checkpointed": checkpointed, "converted": converted}
    return {name: (_stored(network, 4, size) - _stored(network, 2, size)) // 2 for name, network in networks.items()}


def _stored(network: nn.Module, count: int, size: tuple[int, int, int]) -> int:
    network = copy.deepcopy(network).train().requires_grad_()
    like = next(network.parameters())
    images = torch.randn(count, *size, generator=torch.Generator().manual_seed(0)).to(like.device, like.dtype)
    with LiveBytes([images, *network.parameters(), *network.buffers()]) as memory:
        logits = network(images)
    assert logits.requires_grad  # the graph is alive until here
    return memory.now
