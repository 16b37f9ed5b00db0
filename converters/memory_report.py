"""Activation memory of a training step: of a source, with timm's checkpointing too, and of the converted network."""

from __future__ import annotations

import copy

from torch import nn

from petra_zoo.models.classifier import as_classifier
from petra_zoo.models.training_memory import StepBytes, step_bytes


def conversion_memory(source: nn.Module, converted: nn.Module, size: tuple[int, int, int]) -> dict[str, StepBytes]:
    """Bytes of activations per image [C, H, W] of `size` in a training step; the networks stay as they are.

    Returns:
        'source'; 'source, checkpointed' (`set_grad_checkpointing`: every block recomputed); 'converted'.
    """
    checkpointed = as_classifier(copy.deepcopy(source))
    checkpointed.set_grad_checkpointing()
    networks = {"source": source, "source, checkpointed": checkpointed, "converted": converted}
    return {name: step_bytes(network, size) for name, network in networks.items()}
