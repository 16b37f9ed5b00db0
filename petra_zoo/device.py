"""Where tensors are computed."""

from __future__ import annotations

import torch

from petra_zoo.errors import UserError


def choose_device(name: str | None) -> torch.device:
    """The device of that name, or the GPU where there is one.

    Raises:
        UserError: there is no such device, here or anywhere.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = torch.accelerator.current_accelerator(check_available=True)
    known = ["cpu", *([found.type] if found else [])]
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device={name}: there is no such device; expected {' or '.join(known)}") from error
    if device.type not in known:
        kind = "CUDA" if device.type == "cuda" else device.type
        raise UserError(f"device={name}: torch sees no {kind} device here; use device={known[-1]}")
    count = 1 if device.type == "cpu" else torch.accelerator.device_count()
    if device.index is not None and device.index >= count:
        raise UserError(f"device={name}: there are {count} such devices here, from {device.type}:0 on")
    return device
