"""A tick of the pipeline with all stages in one process: its time, what the GPU is busy with, and what it holds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal
from unittest import mock

import timm
import torch
from torch.profiler import ProfilerActivity, profile

from petra_zoo.bench.gpu.device import MIB, peak_bytes, release, seconds_of, synchronize
from petra_zoo.bench.turns import Seconds, median_ratio, take_turns
from petra_zoo.models import PetraRevNet
from petra_zoo.petra import Layout, Optimization, Pipeline
from petra_zoo.petra.capture import Graphs
from petra_zoo.petra.cuda_graph import CudaGraph, Device
from petra_zoo.petra.optimization import NamedParameters
from petra_zoo.reversible import StreamKind
from petra_zoo.strict_json import JsonObject

Capture = Literal["off", "one stream", "side by side"]

_PROFILED = 3  # ticks
_QUEUED = 5  # ticks that are issued one after the other before the device is waited for


@dataclass(frozen=True)
class TickCase:
    """What a tick has to do.

    Attributes:
        network: by its registered name.
        image: height and width.
        batch: images of a micro-batch.
        method: of the pipeline.
        stages: all in this process.
        capture: `off`; `one stream`: a tick is a CUDA graph; `side by side`: with a stream for each stage inside it,
            where they have no need to wait for each other.
        streams: what carries them.
        rounds: how often it is timed.
    """

    network: str
    image: int
    batch: int
    method: str
    stages: int = 4
    streams: StreamKind = "auto"
    capture: Capture = "side by side"
    rounds: int = 10


class Ticks:
    """A pipeline in full swing, fed with the same micro-batch in every tick.

    Args:
        case: what a tick has to do.
        device: where.

    Attributes:
        graphs: CUDA graphs that a tick replays, in their order; none where it launches its kernels itself.
        peak_bytes: the most that it holds while ticks go on, and of a GPU's memory nobody else may have meanwhile.
    """

    def __init__(self, case: TickCase, device: torch.device) -> None:
        self.case, self.device = case, device
        release(device)
        before = _occupied(device)
        torch.manual_seed(0)
        self.pipeline = self._pipeline()
        images = torch.randn(case.batch, 3, case.image, case.image, device=device)
        self.images = images.contiguous(memory_format=torch.channels_last)
        self.labels = torch.randint(0, 100, (case.batch,), device=device)
        for _ in range(4 * case.stages + 4 if device.type == "cuda" else 2 * case.stages):
            self.tick()  # the pipeline fills; kernels are chosen; ticks are captured
        self.graphs = self._replayed() if device.type == "cuda" else []
        self.peak_bytes = peak_bytes(self.tick, device)
        if device.type == "cuda":
            release(device)  # a graph keeps memory to itself, between its replays too
            self.peak_bytes = max(_occupied(device), self.peak_bytes + torch.cuda.memory_allocated()) - before

    def _pipeline(self) -> Pipeline:
        case = self.case
        model = timm.create_model(case.network, num_classes=100, streams=case.streams).to(self.device).train()
        model = model.to(memory_format=torch.channels_last)
        assert isinstance(model, PetraRevNet)
        return Pipeline(
            model,
            Layout.of(model, case.stages, method=case.method, input_size=(3, case.image, case.image)),
            method=case.method,
            optimization=Optimization(self._sgd),
            autocast=torch.bfloat16,
            graphs=self._captured_how(),
        )

    def _captured_how(self) -> Graphs:
        if self.case.capture == "one stream" and self.device.type == "cuda":
            return partial(CudaGraph, Device(self.device, lanes=1))
        return "off" if self.case.capture == "off" else "auto"

    def _sgd(self, named: NamedParameters) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for _, p in named], 0.01, momentum=0.9, fused=True)

    def _replayed(self) -> list[torch.cuda.CUDAGraph]:
        seen: list[torch.cuda.CUDAGraph] = []
        with _noting(seen):
            self.tick()
        return seen

    def tick(self) -> None:
        """Runs one."""
        self.pipeline.step(self.images, self.labels)

    def replay(self) -> None:
        """The same work with nothing around it."""
        for graph in self.graphs:
            graph.replay()

    def timers(self, name: str) -> dict[str, Callable[[], float]]:
        """Of a tick and, where it is captured, of its bare replay, under names that begin with `name`."""
        timers = {f"{name}tick": lambda: _queued(self.tick, self.device)}
        if self.graphs:
            timers[f"{name}replay"] = lambda: _queued(self.replay, self.device)
        return timers


def measure_tick(case: TickCase, device: torch.device) -> JsonObject:
    """Of a pipeline in full swing.

    Returns:
        `tick_ms`: median wall time, many ticks queued one behind the other; `host_ms`: until a tick is issued;
        `peak_mib`. On a GPU also what `_seen_by_profiler` gives and, where ticks are captured, `replay_ms`: the same
        graphs replayed with nothing around them, and `over_replay`: a tick's time over it, round by round.
    """
    ticks = Ticks(case, device)
    seconds = take_turns(ticks.timers(""), case.rounds, warm_up=1)
    found: JsonObject = {
        **_medians(seconds),
        "host_ms": 1e3 * statistics.median(_host_seconds(ticks.tick, device) for _ in range(case.rounds)),
        "peak_mib": ticks.peak_bytes / MIB,
    }
    if ticks.graphs:
        found["over_replay"] = median_ratio(seconds["tick"], seconds["replay"])
    elif (captured := ticks.pipeline.captured) and captured.refusal:
        found["not_captured"] = captured.refusal
    return {**found, **_seen_by_profiler(ticks.tick)} if device.type == "cuda" else found


def measure_side_by_side(network: str, image: int, batch: int, rounds: int, device: torch.device) -> JsonObject:
    """PETRA in four stages beside backpropagation of the whole network, both captured, bfloat16 streams, on one GPU.

    Returns:
        Times and peaks of `backprop`, of petra in `one_stream` and `side_by_side`, in turns; of both the time over
        backprop's, of ticks and of bare replays.
    """
    cases = {
        "backprop": TickCase(network, image, batch, "backprop", stages=1, streams="bfloat16"),
        "one_stream": TickCase(network, image, batch, "petra", streams="bfloat16", capture="one stream"),
        "side_by_side": TickCase(network, image, batch, "petra", streams="bfloat16", capture="side by side"),
    }
    made = {name: Ticks(case, device) for name, case in cases.items()}
    timers = {each: timer for name, ticks in made.items() for each, timer in ticks.timers(f"{name}_").items()}
    seconds = take_turns(timers, rounds, warm_up=1)
    return {
        **_medians(seconds),
        **{f"{name}_peak_mib": ticks.peak_bytes / MIB for name, ticks in made.items()},
        **{
            f"{name}_{kind}_over_backprop": median_ratio(seconds[f"{name}_{kind}"], seconds[f"backprop_{kind}"])
            for name in ("one_stream", "side_by_side")
            for kind in ("tick", "replay")
            if f"{name}_{kind}" in seconds
        },
    }


def _medians(seconds: Seconds) -> JsonObject:
    return {f"{name}_ms": 1e3 * statistics.median(found) for name, found in seconds.items()}


def _occupied(device: torch.device) -> int:
    """Bytes that nothing else on the GPU can have."""
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else 0


def _queued(call: Callable[[], None], device: torch.device) -> float:
    """Seconds of one of many calls that a GPU works off without a pause."""
    times = _QUEUED if device.type == "cuda" else 1

    def queue() -> None:
        for _ in range(times):
            call()

    return seconds_of(queue, device) / times


def _host_seconds(call: Callable[[], None], device: torch.device) -> float:
    """Seconds until a call returns, with nothing before it that the device still works on."""
    synchronize(device)
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _seen_by_profiler(tick: Callable[[], None]) -> JsonObject:
    """Kernels and copies of one tick.

    Returns:
        `kernels`: how many; `kernel_ms`: all their times together; `busy_ms`: in which at least one was running.
    """
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(_PROFILED):
            tick()
        torch.cuda.synchronize()
    events = [e for e in profiler.events() or [] if e.device_type == torch.autograd.DeviceType.CUDA]
    spans = sorted((e.time_range.start, e.time_range.end) for e in events)
    return {
        "kernels": round(len(spans) / _PROFILED),
        "kernel_ms": sum(end - start for start, end in spans) / 1e3 / _PROFILED,
        "busy_ms": covered(spans) / 1e3 / _PROFILED,
    }


def covered(spans: Sequence[tuple[float, float]]) -> float:
    """Length of the union of spans (start, end), which are in the order of their starts."""
    total, reached = 0.0, float("-inf")
    for start, end in spans:
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


@contextmanager
def _noting(seen: list[torch.cuda.CUDAGraph]) -> Iterator[None]:
    replay = torch.cuda.CUDAGraph.replay

    def noted(graph: torch.cuda.CUDAGraph) -> None:
        seen.append(graph)
        replay(graph)

    with mock.patch.object(torch.cuda.CUDAGraph, "replay", noted):
        yield
