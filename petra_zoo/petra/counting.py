"""What can be known of a model's units without computing: operations and shapes, found on the meta device."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from timm.models import get_model_input_config
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from petra_zoo.errors import UserError
from petra_zoo.reversible import Streams, Unit, UnitModel, units_of

Size = tuple[int, int, int]  # [C, H, W] of an image


def count_operations(model: UnitModel, input_size: Size) -> list[float]:
    """Floating-point operations of each unit's forward for one image, counted on the meta device.

    Counts matrix products and convolutions (torch's FlopCounterMode), so it is the same on every machine.

    Args:
        model: its units are counted.
        input_size: [C, H, W] of an image.
    """
    units, streams = _on_meta(model, input_size)
    operations = []
    with torch.no_grad():
        for unit in units:
            with FlopCounterMode(display=False) as counter:
                streams = unit(*streams)
            operations.append(float(counter.get_total_flops()))
    return operations


def output_shapes(model: UnitModel, input_size: Size) -> list[list[torch.Size]]:
    """Shapes of the streams that each unit gives for one image, [1, ...] each."""
    units, streams = _on_meta(model, input_size)
    shapes = []
    with torch.no_grad():
        for unit in units:
            streams = unit(*streams)
            shapes.append([x.shape for x in streams])
    return shapes


def input_size_of(model: UnitModel, given: Sequence[int] | None = None) -> Size | None:
    """[C, H, W] of the images that a model is for: what was given, else what the model says, else None."""
    size = given
    if size is None and isinstance(model, nn.Module) and getattr(model, "pretrained_cfg", {}).get("input_size"):
        size = get_model_input_config(model)["input_size"]  # a network of fixed size may have been built for another
    if size is None:
        return None
    channels, height, width = size
    return (int(channels), int(height), int(width))


def required_input_size(model: UnitModel, given: Sequence[int] | None, instead: str = "") -> Size:
    """The same where there has to be one.

    Raises:
        UserError: nobody says the input size; `instead` is what would do too.
    """
    size = input_size_of(model, given)
    if size is None:
        raise UserError(f"the model does not say its input size: give input_size=(C, H, W){instead}")
    return size


def forget_hooks(model: UnitModel) -> None:
    """Removes a user's hooks from a copy of a model: they are for the model's own forward."""
    for module in model.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
        module._backward_hooks.clear()
        module._backward_pre_hooks.clear()


def _on_meta(model: UnitModel, input_size: Size) -> tuple[list[Unit], Streams]:
    """Units of a copy of the model on the meta device, in eval mode, and one image [1, C, H, W] for the first."""
    model = copy.deepcopy(model).to("meta").eval()
    forget_hooks(model)
    for p in model.parameters():
        p.requires_grad_(False)  # the counter of operations would look for their graphs
    image = torch.empty(1, *input_size, device="meta", dtype=next(model.parameters()).dtype)
    return units_of(model), (image,)
