"""A tick of the pipeline with all stages in one process: its time, what the GPU is busy with, and what it holds."""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import timm
import torch
from torch.profiler import ProfilerActivity, profile

from petra_zoo.bench.gpu.device import MIB, release, seconds_of, synchronize
from petra_zoo.bench.turns import take_turns
from petra_zoo.models import PetraRevNet
from petra_zoo.petra import Layout, Optimization, Pipeline
from petra_zoo.petra.optimization import NamedParameters
from petra_zoo.reversible import LiveBytes
from petra_zoo.strict_json import JsonObject

_PROFILED = 3  # ticks
_QUEUED = 10  # ticks that are issued one after the other before the device is waited for


@dataclass(frozen=True)
class TickCase:
    """What a tick has to do.

    Attributes:
        network: by its registered name.
        image: height and width.
        batch: images of a micro-batch.
        method: of the pipeline.
        stages: all in this process.
        graphs: whether ticks are CUDA graphs.
        rounds: how often it is timed.
    """

    network: str
    image: int
    batch: int
    method: str
    stages: int = 4
    graphs: bool = False
    rounds: int = 10


def graphs_can_be_chosen() -> bool:
    """Whether a pipeline knows captured ticks."""
    return "graphs" in inspect.signature(Pipeline.__init__).parameters


class Ticks:
    """A pipeline that runs, fed with the same micro-batch in every tick.

    Args:
        case: what a tick has to do.
        device: where.
    """

    def __init__(self, case: TickCase, device: torch.device) -> None:
        self.case, self.device = case, device
        torch.manual_seed(0)
        model = timm.create_model(case.network, num_classes=100).to(device).train()
        model = model.to(memory_format=torch.channels_last)
        assert isinstance(model, PetraRevNet)
        layout = Layout.of(model, case.stages, method=case.method, input_size=(3, case.image, case.image))
        chosen = {"graphs": case.graphs} if graphs_can_be_chosen() else {}
        make: Callable[..., Pipeline] = Pipeline
        self.pipeline = make(
            model,
            layout,
            method=case.method,
            optimization=Optimization(self._sgd),
            autocast=torch.bfloat16,
            **chosen,
        )
        images = torch.randn(case.batch, 3, case.image, case.image, device=device)
        self.images = images.contiguous(memory_format=torch.channels_last)
        self.labels = torch.randint(0, 100, (case.batch,), device=device)
        for _ in range(4 * case.stages):  # the pipeline fills; kernels are chosen; ticks are captured
            self.tick()
        synchronize(device)

    def tick(self) -> None:
        """Runs one."""
        self.pipeline.step(self.images, self.labels)

    def _sgd(self, named: NamedParameters) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for _, p in named], 0.01, momentum=0.9, fused=self.device.type == "cuda")


def measure_tick(case: TickCase, device: torch.device) -> JsonObject:
    """Of a pipeline in full swing.

    Returns:
        `tick_ms`: median wall time, many ticks queued one behind the other; `alone_ms`: of one that is waited for;
        `host_ms`: until a tick is issued; `peak_mib`: above what was there before the pipeline was. On a GPU also what
        `_seen_by_profiler` gives and, where ticks are captured, `replay_ms`: the same graphs replayed with nothing
        around them, and `over_replay`: a tick's time over it, round by round.
    """
    release(device)
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    ticks = Ticks(case, device)
    found: JsonObject = {}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    timers = {"tick": lambda: _queued(ticks.tick, device)}
    graphs = _graphs_of(ticks.tick) if device.type == "cuda" else []
    if graphs:
        timers["replay"] = lambda: _queued(lambda: _replay(graphs), device)
    seconds = take_turns(timers, case.rounds, warm_up=1)
    found["tick_ms"] = 1e3 * statistics.median(seconds["tick"])
    found["alone_ms"] = 1e3 * statistics.median(seconds_of(ticks.tick, device) for _ in range(case.rounds))
    found["host_ms"] = 1e3 * statistics.median(_host_seconds(ticks.tick, device) for _ in range(3))
    if graphs:
        found["graphs"] = len(graphs)
        found["replay_ms"] = 1e3 * statistics.median(seconds["replay"])
        found["over_replay"] = statistics.median(
            tick / replayed for tick, replayed in zip(seconds["tick"], seconds["replay"], strict=True)
        )
    if device.type != "cuda":
        with LiveBytes() as memory:
            ticks.tick()
        return {**found, "peak_mib": memory.peak / MIB}
    found["peak_mib"] = (torch.cuda.max_memory_allocated(device) - before) / MIB
    return {**found, **_seen_by_profiler(ticks.tick)}


def _queued(call: Callable[[], None], device: torch.device) -> float:
    """Seconds of one of many calls that the device works off without a pause."""

    def queue() -> None:
        for _ in range(_QUEUED):
            call()

    return seconds_of(queue, device) / _QUEUED


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


def _graphs_of(tick: Callable[[], None]) -> list[torch.cuda.CUDAGraph]:
    """The CUDA graphs that a tick replays, in their order; none where it launches its kernels itself."""
    seen: list[torch.cuda.CUDAGraph] = []
    with _noting(seen):
        tick()
    torch.cuda.synchronize()
    return seen


@contextmanager
def _noting(seen: list[torch.cuda.CUDAGraph]) -> Iterator[None]:
    replay = torch.cuda.CUDAGraph.replay

    def noted(graph: torch.cuda.CUDAGraph) -> None:
        seen.append(graph)
        replay(graph)

    with mock.patch.object(torch.cuda.CUDAGraph, "replay", noted):
        yield


def _replay(graphs: Sequence[torch.cuda.CUDAGraph]) -> None:
    for graph in graphs:
        graph.replay()
