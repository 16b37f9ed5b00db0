"""Measures what each unit of a model costs here, with the primitives that training calls."""

from __future__ import annotations

import copy
import os
import platform
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor, nn

from petra_zoo.petra.counting import forget_hooks
from petra_zoo.petra.generator import own_generators
from petra_zoo.petra.profile import Profile
from petra_zoo.petra.unit_profile import UnitProfile
from petra_zoo.reversible import (
    Gradients,
    LiveBytes,
    Reversal,
    Streams,
    Unit,
    UnitModel,
    gradients_of,
    units_of,
)


def measure(
    model: UnitModel,
    batch_size: int,
    input_size: Sequence[int],
    *,
    repeats: int = 5,
    budget: float = 30.0,
    autocast: torch.dtype | None = None,
    fed: torch.dtype | None = None,
    device: torch.device | None = None,
) -> Profile:
    """Measures the units of a model on the device and with the number of threads it would be trained with.

    Works on a copy: parameters, buffers, gradients, modes and the global generators stay as they are. Every repeat
    walks once through all units, as training does, so that a machine that slows down for a while slows all of them;
    the median over the repeats is kept, after one walk to warm up. Never holds the graph of more than one unit.

    Args:
        model: whose units are measured. Tensors on the meta device have stand-ins while their unit is: times do not
            depend on values, and the whole network need not be here. Its live bytes are counted without autocast.
        batch_size: images per micro-batch.
        input_size: [C, H, W] of an image.
        repeats: how often every unit is timed.
        budget: seconds after which no other repeat is begun.
        autocast: run units under autocast to this type.
        fed: type in which images are fed, and wait for their backward; default: the model's.
        device: that is measured; default: the model's.
    """
    name = type(model).__name__
    name = getattr(model, "pretrained_cfg", {}).get("architecture") or name
    first = next(model.parameters())
    device = device or first.device
    model = copy.deepcopy(model).train()
    forget_hooks(model)
    assert isinstance(model, nn.Module)  # which a protocol cannot say
    model._apply(lambda x: x if x.is_meta else x.to(device))
    units = units_of(model)
    walker = _Walker(units, device, autocast)
    channels, height, width = input_size
    size = (int(channels), int(height), int(width))
    with own_generators(device):
        images = torch.randn(batch_size, *size, device=device, dtype=first.dtype)
        walker.walk(images)
        start = time.perf_counter()
        walks = [walker.walk(images)]
        while len(walks) < repeats and time.perf_counter() - start < budget:
            walks.append(walker.walk(images))
        # Live bytes grow linearly with the batch, apart from statistics: two small batches give them exactly.
        counter, images = _counter(model, walker, images)
        two, four = counter.count_bytes(images.new_zeros(2, *size)), counter.count_bytes(images.new_zeros(4, *size))
    live = [
        tuple(b + (c - b) // 2 * (batch_size - 2) for b, c in zip(of_two, of_four, strict=True))
        for of_two, of_four in zip(two, four, strict=True)
    ]
    if fed is not None:
        for walk in walks:
            walk.input_bytes[0] = images.numel() * fed.itemsize
    return Profile(
        model=name,
        batch_size=batch_size,
        input_size=size,
        autocast=None if autocast is None else str(autocast).removeprefix("torch."),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        threads=torch.get_num_threads(),
        machine=f"{platform.machine()}, {os.cpu_count()} cores",
        versions=_versions("petra-zoo", "torch", "timm"),
        units=tuple(_unit_profile(i, unit, walks, *live[i]) for i, unit in enumerate(units)),
    )


def _unit_profile(i: int, unit: Unit, walks: list[_Walk], graph_bytes: int, working_bytes: int) -> UnitProfile:
    forward, reverse, graph_forward, graph_backward = (
        statistics.median(walk.seconds[i][column] for walk in walks) for column in range(4)
    )
    return UnitProfile(
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
        graph_bytes=graph_bytes,
        working_bytes=working_bytes,
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
        for unit in units:
            unit.same_parameters = False  # nor the generator
        self.device = device
        self.autocast = autocast

    def walk(self, images: Tensor) -> _Walk:
        """Forward through all units and back as PETRA does, then with graphs, unit by unit."""
        seconds: list[list[float]] = [[] for _ in self.units]
        sizes = [images.nbytes]
        kept: list[Streams] = []  # of each unit what its backward needs: its input, or its residue
        streams: Streams = (images,)
        for i, unit in enumerate(self.units):
            inputs = streams
            with self.present(unit), self.clock(seconds[i]), torch.no_grad(), self.precision():
                streams, residue = unit.evaluate(*inputs)
            kept.append(residue if unit.reversible else inputs)
            sizes.append(sum(x.nbytes for x in streams))
        gradients: Gradients = tuple(torch.randn_like(x) for x in streams)
        for i in reversed(range(len(self.units))):
            with self.present(self.units[i]), self.clock(seconds[i]):
                reversal = self.reverse(i, kept.pop(), streams, gradients)
            streams, gradients = reversal.inputs, reversal.input_gradients
        streams = (images,)
        for i, unit in enumerate(self.units):
            inputs = tuple(x.detach().requires_grad_(i > 0) for x in streams)
            with self.present(unit):
                with self.clock(seconds[i]), self.precision():
                    outputs = unit(*inputs)
                gradients = tuple(torch.randn_like(x) for x in outputs)
                with self.clock(seconds[i]):
                    wanted = [*(x for x in inputs if x.requires_grad), *_trained(unit)]
                    gradients_of(outputs, gradients, wanted)
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
            inputs = streams
            with torch.no_grad(), self.precision():
                streams, residue = unit.evaluate(*inputs)
            kept.append(residue if unit.reversible else inputs)
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
            if unit.reversible:
                return unit.reverse(streams, gradients, _trained(unit), residue=kept)
            return unit.recompute(kept, gradients, _trained(unit), needs_input_gradient=i > 0)

    @contextmanager
    def present(self, unit: Unit) -> Iterator[None]:
        """Inside, what is missing of a unit has a stand-in of the same size."""
        missing: list[tuple[nn.Module, str, Tensor]] = [
            (module, name, x)
            for module in unit.modules()
            for name, x in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
            if x.is_meta
        ]
        for module, name, x in missing:
            stand_in = torch.full_like(x, 0.01, device=self.device)
            setattr(module, name, nn.Parameter(stand_in, x.requires_grad) if isinstance(x, nn.Parameter) else stand_in)
        yield
        for module, name, x in missing:
            setattr(module, name, x)

    @contextmanager
    def precision(self) -> Iterator[None]:
        with torch.autocast(self.device.type, dtype=self.autocast) if self.autocast else nullcontext():
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


def _counter(model: UnitModel, walker: _Walker, images: Tensor) -> tuple[_Walker, Tensor]:
    """What counts live bytes, and of which images.

    The graph of all units is alive at once: that of a model that is not whole stays on the meta device, where autocast
    does nothing.
    """
    if not any(x.is_meta for unit in walker.units for x in (*unit.parameters(), *unit.buffers())):
        return walker, images
    on_meta = copy.deepcopy(model)
    units = units_of(on_meta)
    for unit in units:
        unit.to("meta")
    return _Walker(units, torch.device("meta"), None), images.to("meta")


def _trained(unit: Unit) -> list[nn.Parameter]:
    return [p for p in unit.parameters() if p.requires_grad]


def _versions(*packages: str) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # run from a checkout
            found[package] = "unknown"
    return found
