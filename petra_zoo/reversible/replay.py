"""What a second evaluation of a unit must replay so that it computes what the first one did.

A recomputation in the backward pass has to see the same generator states (dropout, stochastic depth), the same
autocast settings and the same train or eval mode, and it must not update batch-norm running statistics again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Normalisation layers in train mode use batch statistics and touch no buffer.

    The layer's own switch `track_running_stats` does exactly this for every batch norm of torch and timm,
    SyncBatchNorm included, and leaves layers in eval mode (running statistics) as they are.
    """
    frozen: list[Any] = [m for m in module.modules() if m.training and getattr(m, "track_running_stats", False)]
    for m in frozen:
        m.track_running_stats = False
    try:
        yield
    finally:
        for m in frozen:
            m.track_running_stats = True


def generator_states(device: torch.device) -> dict[str, Tensor]:
    """States of the global generators a unit on `device` may draw from: the CPU's and the device's."""
    states = {"cpu": torch.get_rng_state()}
    if device.type not in ("cpu", "meta"):
        states[str(device)] = torch.get_device_module(device.type).get_rng_state(device)
    return states


def set_generator_states(states: dict[str, Tensor]) -> None:
    """Puts states read by `generator_states` back."""
    for name, state in states.items():
        if name == "cpu":
            torch.set_rng_state(state)
        else:
            torch.get_device_module(torch.device(name).type).set_rng_state(state, torch.device(name))


@dataclass
class Replay:
    """The surroundings of one evaluation of a unit, to be recreated for a later one.

    Record before the evaluation, `settle` after it: the generator states are kept only where they were used.
    """

    module: nn.Module
    modes: list[bool]
    autocast: list[tuple[str, torch.dtype, bool]]
    generators: dict[str, Tensor]

    @classmethod
    def record(cls, module: nn.Module, device: torch.device) -> Replay:
        kinds = ("cpu",) if device.type in ("cpu", "meta") else ("cpu", device.type)
        return cls(
            module,
            [m.training for m in module.modules()],
            [(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)) for kind in kinds],
            generator_states(device),
        )

    def settle(self, device: torch.device) -> None:
        """Forgets the generator states when the evaluation drew no random number."""
        now = generator_states(device)
        if all(torch.equal(state, now[name]) for name, state in self.generators.items()):
            self.generators = {}

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Inside, the unit computes what it computed then; outside, nothing has changed."""
        with ExitStack() as stack:
            for kind, dtype, enabled in self.autocast:
                if enabled or torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled))
            if self.generators:
                outside = {name: generator_states(torch.device(name))[name] for name in self.generators}
                stack.callback(set_generator_states, outside)
                set_generator_states(self.generators)
            modules = list(self.module.modules())
            outside_modes = [m.training for m in modules]
            if outside_modes != self.modes:
                stack.callback(_set_modes, modules, outside_modes)
                _set_modes(modules, self.modes)
            yield


def _set_modes(modules: list[nn.Module], modes: list[bool]) -> None:
    for m, training in zip(modules, modes, strict=True):
        m.training = training
