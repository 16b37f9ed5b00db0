"""Profiles: what each unit of a model costs here, measured with the primitives that training calls.

Balancing a partition and predicting a pipeline (`performance.py`) both start from a profile. It is measured once,
saved as JSON and sent to the other ranks, so that all of them compute the same partition.
"""

from __future__ import annotations

import copy
import os
import platform
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from petra_zoo.errors import UserError
from petra_zoo.reversible import CoupledUnit, LiveBytes, Streams, Unit
from petra_zoo.reversible.unit import Gradients, Reversal, gradients_of

Work = Literal["graph", "reverse", "rerun"]

# What a unit does for a micro-batch under each method, the last stage apart: keep the graph of its forward; forward
# without graph and one primitive back; forward without graph, once more with it, and backward.
WORK: dict[str, Work] = {
    "petra": "reverse",
    "reversible": "reverse",
    "dsp": "rerun",
    "delayed": "graph",
    "local": "graph",
    "backprop": "graph",
}


@dataclass(frozen=True)
class UnitProfile:
    """One unit at the profile's micro-batch size. Times in seconds; the stem's without an input gradient.

    Attributes:
        reversible: whether it has an inverse.
        keeps_input: whether PETRA keeps its input between forward and backward (no inverse, or an anchor).
        forward: forward without a graph.
        reverse: backward from the unit's output (or kept input), recomputation included.
        graph_forward: forward that keeps its graph.
        graph_backward: backward through that graph.
        parameter_bytes: of its parameters.
        input_bytes: of the streams that enter.
        output_bytes: of the streams that leave.
        graph_bytes: what the unit adds to the live bytes of a graph of all units; less than 0 where it frees more of
            what came in than it keeps.
        working_bytes: peak of live bytes inside `reverse`, parameter gradients included.
    """

    name: str
    reversible: bool
    keeps_input: bool
    forward: float
    reverse: float
    graph_forward: float
    graph_backward: float
    parameter_bytes: int
    input_bytes: int
    output_bytes: int
    graph_bytes: int
    working_bytes: int

    @property
    def recomputation(self) -> float:
        """Seconds of `reverse` beyond a backward through a kept graph."""
        return max(0.0, self.reverse - self.graph_backward)

    def seconds(self, work: Work) -> float:
        """Seconds per micro-batch of one kind of work."""
        if work == "graph":
            return self.graph_forward + self.graph_backward
        return self.forward + (self.reverse if work == "reverse" else self.graph_forward + self.graph_backward)


@dataclass(frozen=True)
class Profile:
    """What the units of a model cost for one micro-batch, and where that was measured."""

    model: str
    batch_size: int
    input_size: tuple[int, int, int]
    autocast: str | None
    device: str
    threads: int
    machine: str
    versions: dict[str, str]
    units: tuple[UnitProfile, ...]

    def costs(self, method: str = "petra", *, last_stage: bool = False) -> list[float]:
        """Seconds of each unit for one micro-batch.

        Args:
            method: a method of `Pipeline`.
            last_stage: the cost in a last stage that keeps its graph, which needs no recomputation.
        """
        if method not in WORK:
            raise ValueError(f"method is one of {', '.join(WORK)}, not {method!r}")
        work: Work = "graph" if last_stage else WORK[method]
        return [unit.seconds(work) for unit in self.units]

    def to_json(self) -> str:
        """The profile as JSON text."""
        return TypeAdapter(Profile).dump_json(self, indent=1).decode() + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> Profile:
        """Reads what `to_json` gave.

        Raises:
            ValueError: the text is not a profile.
        """
        return TypeAdapter(cls).validate_json(text)

    def save(self, path: Path) -> None:
        """Writes JSON; an existing file is replaced at once or not at all."""
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            beside.write_text(self.to_json())
            beside.replace(path)
        except OSError as error:
            beside.unlink(missing_ok=True)
            raise UserError(f"cannot write the profile {path}: {error.strerror}") from error

    @classmethod
    def load(cls, path: Path) -> Profile:
        """Reads a saved profile.

        Raises:
            UserError: no such file, or it is not a profile.
        """
        try:
            return cls.from_json(path.read_bytes())
        except OSError as error:
            raise UserError(f"cannot read the profile {path}: {error.strerror}") from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the file"
            raise UserError(
                f"{path} is not a profile: {where}: {first['msg']}; petra-zoo plan MODEL --save-profile FILE writes one"
            ) from error


def measure(
    model: Any,
    batch_size: int,
    input_size: Sequence[int],
    *,
    repeats: int = 5,
    budget: float = 30.0,
    autocast: torch.dtype | None = None,
) -> Profile:
    """Measures the units of a model on the device and with the number of threads it would be trained with.

    Works on a copy: parameters, buffers, gradients, modes and the global generators stay as they are. Every repeat
    walks once through all units, as training does, so that a machine that slows down for a while slows all of them;
    the median over the repeats is kept, after one walk to warm up. Never holds the graph of more than one unit.

    Args:
        model: a model with `units()`.
        batch_size: images per micro-batch.
        input_size: [C, H, W] of an image.
        repeats: how often every unit is timed.
        budget: seconds after which no other repeat is begun.
        autocast: run units under autocast to this type.
    """
    name = type(model).__name__
    name = getattr(model, "pretrained_cfg", {}).get("architecture") or name
    model = copy.deepcopy(model).train()
    for module in model.modules():  # a user's hooks are for the model's own forward
        for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            getattr(module, hooks).clear()
    first = next(model.parameters())
    units: list[Unit] = list(model.units())
    walker = _Walker(units, first.device, autocast)
    size = (int(input_size[0]), int(input_size[1]), int(input_size[2]))
    with torch.random.fork_rng([first.device] if first.device.type == "cuda" else [], device_type="cuda"):
        images = torch.randn(batch_size, *size, device=first.device, dtype=first.dtype)
        walker.walk(images)
        start = time.perf_counter()
        walks = [walker.walk(images)]
        while len(walks) < repeats and time.perf_counter() - start < budget:
            walks.append(walker.walk(images))
        # Live bytes grow linearly with the batch, apart from statistics: two small batches give them exactly.
        two, four = walker.count_bytes(images.new_zeros(2, *size)), walker.count_bytes(images.new_zeros(4, *size))
    rows = []
    for i, unit in enumerate(units):
        forward, reverse, graph_forward, graph_backward = (
            statistics.median(walk.seconds[i][column] for walk in walks) for column in range(4)
        )
        graph, working = (b + (c - b) // 2 * (batch_size - 2) for b, c in zip(two[i], four[i], strict=True))
        rows.append(
            UnitProfile(
                name=unit.name,
                reversible=unit.reversible,
                keeps_input=not unit.reversible or unit.anchor,
                forward=forward,
                reverse=reverse,
                graph_forward=graph_forward,
                graph_backward=graph_backward,
                parameter_bytes=sum(p.nbytes for p in unit.parameters()),
                input_bytes=walks[0].input_bytes[i],
                output_bytes=walks[0].output_bytes[i],
                graph_bytes=graph,
                working_bytes=working,
            )
        )
    return Profile(
        model=name,
        batch_size=batch_size,
        input_size=size,
        autocast=None if autocast is None else str(autocast).removeprefix("torch."),
        device=torch.cuda.get_device_name(first.device) if first.device.type == "cuda" else first.device.type,
        threads=torch.get_num_threads(),
        machine=f"{platform.machine()}, {os.cpu_count()} cores",
        versions=_versions("petra-zoo", "torch", "timm"),
        units=tuple(rows),
    )


@dataclass
class _Walk:
    """One walk through the units: (forward, reverse, graph forward, graph backward) seconds of each."""

    seconds: list[list[float]]
    input_bytes: list[int]
    output_bytes: list[int]


class _Walker:
    """Runs units in the ways that training does."""

    def __init__(self, units: list[Unit], device: torch.device, autocast: torch.dtype | None) -> None:
        self.units = units
        self.parameters = [[p for p in unit.parameters() if p.requires_grad] for unit in units]
        self.device = device
        self.autocast = autocast

    def walk(self, images: Tensor) -> _Walk:
        """Forward through all units and back as PETRA does, then with graphs, unit by unit."""
        seconds: list[list[float]] = [[] for _ in self.units]
        sizes = [images.nbytes]
        kept: list[Streams] = []
        streams: Streams = (images,)
        for i, unit in enumerate(self.units):
            kept.append(() if unit.reversible else streams)
            with self.clock(seconds[i]), torch.no_grad(), self.precision():
                streams = unit(*streams)
            sizes.append(sum(x.nbytes for x in streams))
        gradients: Gradients = tuple(torch.randn_like(x) for x in streams)
        for i in reversed(range(len(self.units))):
            with self.clock(seconds[i]):
                reversal = self.reverse(i, kept.pop(), streams, gradients)
            streams, gradients = reversal.inputs, reversal.input_gradients
        streams = (images,)
        for i, unit in enumerate(self.units):
            inputs = tuple(x.detach().requires_grad_(i > 0) for x in streams)
            with self.clock(seconds[i]), self.precision():
                outputs = unit(*inputs)
            gradients = tuple(torch.randn_like(x) for x in outputs)
            with self.clock(seconds[i]):
                gradients_of(outputs, gradients, [*(x for x in inputs if x.requires_grad), *self.parameters[i]])
            streams = tuple(x.detach() for x in outputs)
        return _Walk(seconds, sizes[:-1], sizes[1:])

    def count_bytes(self, images: Tensor) -> list[tuple[int, int]]:
        """Of each unit: what it adds to the graph of all units, and the peak of live bytes inside `reverse`."""
        graph: list[int] = []
        kept: list[Streams] = []
        streams: Streams = (images,)
        with LiveBytes([images]) as memory:
            for unit in self.units:
                before = memory.now
                with self.precision():
                    streams = unit(*streams)
                torch.empty(0)  # counts anew: the unit's input may have died
                graph.append(memory.now - before)
        streams = (images,)
        for unit in self.units:
            kept.append(() if unit.reversible else streams)
            with torch.no_grad(), self.precision():
                streams = unit(*streams)
        gradients: Gradients = tuple(torch.ones_like(x) for x in streams)
        working: list[int] = []
        for i in reversed(range(len(self.units))):
            with LiveBytes() as memory:  # the streams and gradients that enter exist already
                reversal = self.reverse(i, kept.pop(), streams, gradients)
            working.insert(0, memory.peak)
            streams, gradients = reversal.inputs, reversal.input_gradients
        return list(zip(graph, working, strict=True))

    def reverse(self, i: int, kept: Streams, streams: Streams, gradients: Gradients) -> Reversal:
        unit = self.units[i]
        with self.precision():
            if isinstance(unit, CoupledUnit) and unit.reversible:
                return unit.reverse(streams, gradients, self.parameters[i])
            return unit.recompute(kept, gradients, self.parameters[i], needs_input_gradient=i > 0)

    @contextmanager
    def precision(self) -> Iterator[None]:
        with torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            yield

    @contextmanager
    def clock(self, seconds: list[float]) -> Iterator[None]:
        """Appends what the block takes, a GPU's work included."""
        wait = torch.cuda.synchronize if self.device.type == "cuda" else lambda device: None
        wait(self.device)
        start = time.perf_counter()
        yield
        wait(self.device)
        seconds.append(time.perf_counter() - start)


def _versions(*packages: str) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # run from a checkout
            found[package] = "unknown"
    return found
