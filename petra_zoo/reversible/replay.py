"""What a second evaluation of a unit must replay so that it computes what the first one did.

A recomputation in the backward pass has to see the same tensors in the unit's modules (`state.py`), the same generator
states (dropout, stochastic depth), the same autocast settings and the same train or eval mode.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from petra_zoo.reversible.batch_statistics import RememberStatistics, Statistics, UseStatistics
from petra_zoo.reversible.state import Held


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


_drawing: list[list[Held]] = []


@contextmanager
def units_that_draw() -> Iterator[list[Held]]:
    """Gathers what is held by the units that draw random numbers in a recorded evaluation inside."""
    drawing: list[Held] = []
    _drawing.append(drawing)
    try:
        yield drawing
    finally:
        _drawing.remove(drawing)


def _is_captured(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured, in which no generator's state can be read; see `units_that_draw`."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _bytes(state: Tensor) -> bytes:
    return bytes(state.numpy())


@dataclass
class Replay:
    """The surroundings of one evaluation of a unit, to be recreated for a later one."""

    held: Held
    modes: list[bool]
    autocast: list[tuple[str, torch.dtype, bool]]
    generators: dict[str, Tensor]
    statistics: Statistics

    @classmethod
    @contextmanager
    def recording(cls, held: Held, device: torch.device) -> Iterator[Replay]:
        """Around the first evaluation.

        Args:
            held: what the unit holds.
            device: of its streams.
        """
        kinds = ("cpu",) if device.type in ("cpu", "meta") else ("cpu", device.type)
        # The generators tell whether the unit draws. Its modules' types cannot (methods may be replaced, of an instance
        # or of a class, and functions too), and looking at them takes longer.
        generators = {} if _is_captured(device) else generator_states(device)
        held.begin()  # before the evaluation: a spectral norm's vectors or a counter move in it
        with RememberStatistics() as remembered:
            replay = cls(
                held,
                [m.training for m in held.state.modules],
                [(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)) for kind in kinds],
                generators,
                remembered.statistics,
            )
            yield replay
        held.evaluated()
        now = generator_states(device) if generators else {}
        if all(_bytes(state) == _bytes(now[name]) for name, state in generators.items()):
            replay.generators = {}  # the unit drew no random number
        for drawing in _drawing:
            drawing += [held] if replay.generators else []

    @contextmanager
    def __call__(self, stand_ins: Mapping[int, Tensor] | None = None) -> Iterator[None]:
        """Inside, the unit computes what it computed then; outside, nothing has changed.

        Args:
            stand_ins: by id, what stands in the place of some of its tensors.
        """
        tensors = [stand_ins.get(id(x), x) for x in self.held.tensors] if stand_ins else self.held.tensors
        with ExitStack() as stack:
            stack.enter_context(self.held.state.holding(tensors))
            stack.enter_context(UseStatistics(self.statistics))
            for kind, dtype, enabled in self.autocast:
                if enabled or torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled))
            if self.generators:
                outside = {name: generator_states(torch.device(name))[name] for name in self.generators}
                stack.callback(set_generator_states, outside)
                set_generator_states(self.generators)
            modules = self.held.state.modules
            outside_modes = [m.training for m in modules]
            if outside_modes != self.modes:
                stack.callback(_set_modes, modules, outside_modes)
                _set_modes(modules, self.modes)
            yield


def _set_modes(modules: list[nn.Module], modes: list[bool]) -> None:
    for m, training in zip(modules, modes, strict=True):
        m.training = training
