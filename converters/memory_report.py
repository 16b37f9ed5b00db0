"""Activation memory of a training step: of a source, with timm's checkpointing too, and of the converted network."""

from __future__ import annotations

import copy

from torch import nn

from petra_zoo.errors import UserError
from petra_zoo.models.training_memory import StepBytes, step_bytes

LEAST_SAVING = 0.1  # of the source's peak
_MIB = 2**20


def conversion_memory(source: nn.Module, converted: nn.Module, size: tuple[int, int, int]) -> dict[str, StepBytes]:
    """Bytes of activations per image [C, H, W] of `size` in a training step; the networks stay as they are.

    Returns:
        'source'; 'source, checkpointed' (`set_grad_checkpointing`: every block recomputed), where it has that;
        'converted'. Nothing where a network looks at values, which it cannot without an image.
    """
    networks = {"source": source, "source, checkpointed": _checkpointed(source), "converted": converted}
    try:
        return {name: step_bytes(network, size) for name, network in networks.items() if network is not None}
    except (NotImplementedError, RuntimeError):
        return {}


def check_saving(name: str, memory: dict[str, StepBytes]) -> None:
    """Refuses a conversion that saves next to nothing.

    Raises:
        UserError: a training step of the converted network peaks about where the source's does.
    """
    if not memory:
        return
    source, converted = memory["source"].peak, memory["converted"].peak
    if converted > (1.0 - LEAST_SAVING) * source:
        raise UserError(
            f"converting {name} does not pay: a training step peaks at {converted / _MIB:.2f} MiB per image, the "
            f"source's at {source / _MIB:.2f}; --coupling 0.25, for instance, converts it all the same"
        )


def _checkpointed(source: nn.Module) -> nn.Module | None:
    """A copy that recomputes every block; None: it has no such switch."""
    copied = copy.deepcopy(source)
    switch = getattr(copied, "set_grad_checkpointing", None)
    if not callable(switch):
        return None
    try:
        switch()
    except (AssertionError, NotImplementedError):  # timm's word for it
        return None
    return copied
