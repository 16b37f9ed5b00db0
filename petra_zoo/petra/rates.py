"""Updates that a CUDA graph can hold: optimizers that read nothing back, and learning rates that lie on the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class Rates:
    """An optimizer's learning rates as numbers on the device.

    Schedules set a float in a parameter group, and a captured update would go on with the one that it was captured
    with. So the float stays what users and schedules see, and the update reads a tensor that is set to it.

    Args:
        optimizer: whose they are.
        device: of its parameters.
    """

    def __init__(self, optimizer: Optimizer, device: torch.device) -> None:
        self.optimizer, self.device = optimizer, device
        self.values: list[float] = []

    def refresh(self) -> None:
        """Sets the numbers on the device to those of the schedule, in one copy."""
        values = [float(group["lr"]) for group in self.optimizer.param_groups]
        if len(values) != len(self.values):
            self._numbers = torch.empty(len(values), dtype=torch.float32, device=self.device)
            self.tensors = list(self._numbers.unbind())
        if values != self.values:
            self._numbers.copy_(torch.tensor(values), non_blocking=True)
            self.values = values

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Inside, the groups' rates are tensors."""
        self.refresh()
        groups = self.optimizer.param_groups
        floats = [group["lr"] for group in groups]
        for group, rate in zip(groups, self.tensors, strict=True):
            group["lr"] = rate
        try:
            yield
        finally:
            for group, value in zip(groups, floats, strict=True):
                group["lr"] = value


def rates_of(optimizer: Optimizer, device: torch.device, *, prepare: bool = True) -> Rates | None:
    """An optimizer's rates, where its updates can be captured; else None.

    Args:
        optimizer: before its first step.
        device: of its parameters.
        prepare: whether to make its updates such, as far as it goes: torch's run fused, torch's and timm's that have it
            run `capturable`.
    """
    for settings in (optimizer.defaults, *optimizer.param_groups) if prepare else ():
        if "capturable" in settings and device.type == "cuda":
            settings["capturable"] = True
        if settings.get("fused", False) is None and not (settings.get("foreach") or settings.get("differentiable")):
            settings["fused"] = True
    capturable = all(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    floats = all(not isinstance(group["lr"], Tensor) for group in optimizer.param_groups)
    return Rates(optimizer, device) if capturable and floats else None


def numbers_of(optimizer: Optimizer | None) -> list[Any]:
    """What an optimizer keeps as plain numbers: one that counts its steps in them cannot be captured."""
    if optimizer is None:
        return []
    kept = [*optimizer.param_groups, *optimizer.state.values()]
    return [(key, x) for values in kept for key, x in values.items() if isinstance(x, int | float) and key != "lr"]
