"""The profile of a named model: measured here, or read from a file and checked against what was asked for."""

from __future__ import annotations

from pathlib import Path

import torch
from timm.models import get_model_input_config

from petra_zoo.checkpoints.hub_errors import first_line
from petra_zoo.checkpoints.load import create_model, resolve_source, set_image_size
from petra_zoo.device import choose_device
from petra_zoo.errors import UserError
from petra_zoo.petra import Profile, measure

BATCH_SIZE = 64


def profile_of(
    name: str,
    path: Path | None = None,
    *,
    batch_size: int | None = None,
    input_size: tuple[int, int, int] | None = None,
    device: str | None = None,
) -> Profile:
    """The profile at `path`, or a new one of a model with random weights.

    Args:
        name: a model's name.
        path: a saved profile.
        batch_size: images per micro-batch; default: the saved profile's, or 64.
        input_size: [C, H, W]; default: the saved profile's, or the model's own.
        device: where to measure; default: the GPU where there is one.

    Raises:
        UserError: no such model, or the saved profile is of another model, batch or image size.
    """
    if path is not None:
        profile = Profile.load(path)
        for what, asked, saved in (
            ("model", name.removeprefix("petra_"), profile.model.removeprefix("petra_")),
            ("batch size", batch_size, profile.batch_size),
            ("input size", input_size, profile.input_size),
        ):
            if asked is not None and asked != saved:
                raise UserError(f"{path} was measured with {what} {saved}, not {asked}: leave --profile out to measure")
        return profile
    chosen = choose_device(device)
    model = create_model(resolve_source(name), in_chans=input_size[0] if input_size else 3)
    size = input_size or tuple(get_model_input_config(model)["input_size"])
    set_image_size(model, name, *size[1:])
    images = batch_size or BATCH_SIZE
    try:
        return measure(model.to(chosen), images, size, fed=torch.uint8)  # as recipes feed them
    except UserError:
        raise
    except ValueError as error:  # a norm in train mode
        raise UserError(
            f"{name} cannot train on micro-batches of {images} images of this size: {first_line(error)}"
        ) from error
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{name} with micro-batches of {images} images does not fit this device: give a smaller --batch-size"
        ) from error
