"""A piece of work that is queued once and then replayed as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol
from weakref import WeakSet

import torch

from petra_zoo.petra.generator import seeded_by
from petra_zoo.petra.tick import InLine, Lanes

_WIDEST_PER_MULTIPROCESSOR = 2**17  # numbers in a stream, up to which one stage leaves room for others


class Graph(Protocol):
    """Work that can be replayed: on the same memory, with other random numbers."""

    def capture(self, work: Callable[[Lanes], None], seeds: Sequence[int | None], widest: int = 0) -> None:
        """Runs `work` once to see what it does; on a GPU it is not done before the first replay.

        Args:
            work: is given the lanes on which it may queue what does not wait for each other.
            seeds: of the generators, in the order in which `work` seeds them; None where nothing is drawn then.
            widest: how many numbers the largest tensor has that `work` sends from one lane to another.
        """

    def replay(self, seeds: Sequence[int | None]) -> None:
        """Does the work."""


class Device:
    """What all graphs of a pipeline share on one GPU: memory, streams, generators.

    Args:
        device: the GPU.
        lanes: how many streams work that is independent may be spread over; 1: all of it is in line.
    """

    def __init__(self, device: torch.device, lanes: int) -> None:
        self.device = device
        self.graphs: WeakSet[CudaGraph] = WeakSet()
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(device)
        self.lanes = [torch.cuda.Stream(device) for _ in range(lanes)] if lanes > 1 else []
        self.generators: list[torch.Generator] = []

    def take_in(self, graph: CudaGraph) -> None:
        """Lets a graph share; a pool does not outlive its graphs, so the first one gets a new one."""
        if not self.graphs:
            self.pool = torch.cuda.graph_pool_handle()
        self.graphs.add(graph)

    def gains_from_lanes(self, widest: int) -> bool:
        """Whether lanes are worth their memory, of which one does not use again what another has freed.

        On an H200 four stages side by side took .45 of the time of one line with 1 M numbers in a stream, .81 with 17 M
        and .96 with 51 M, where memory nearly doubled.
        """
        multiprocessors = torch.cuda.get_device_properties(self.device).multi_processor_count
        return bool(self.lanes) and widest <= _WIDEST_PER_MULTIPROCESSOR * multiprocessors

    def generators_for(self, count: int) -> list[torch.Generator]:
        """So many generators of their own."""
        while len(self.generators) < count:
            self.generators.append(torch.Generator(self.device))
        return self.generators[:count]


class CudaGraph:
    """A CUDA graph.

    Args:
        shared: with the other graphs of the pipeline; never replayed at the same time as one of them.
    """

    def __init__(self, shared: Device) -> None:
        self.shared = shared
        self.graph = torch.cuda.CUDAGraph()
        self.generators: list[torch.Generator] = []

    def capture(self, work: Callable[[Lanes], None], seeds: Sequence[int | None], widest: int = 0) -> None:
        shared = self.shared
        shared.take_in(self)
        lanes = shared.lanes if shared.gains_from_lanes(widest) else []
        self.generators = shared.generators_for(sum(seed is not None for seed in seeds))
        for generator in self.generators:
            self.graph.register_generator_state(generator)
        with (
            torch.cuda.device(shared.device),
            # Another thread may pin memory or prefetch meanwhile: that is no part of this.
            torch.cuda.graph(self.graph, pool=shared.pool, stream=shared.stream, capture_error_mode="thread_local"),
            _no_cast_is_cached(),
            _generators_in_turn(shared.device, self.generators, seeds),
        ):
            work(_Streams(lanes) if lanes else InLine())

    def replay(self, seeds: Sequence[int | None]) -> None:
        drawn = [seed for seed in seeds if seed is not None]
        for generator, seed in zip(self.generators, drawn, strict=True):
            generator.manual_seed(seed)
        self.graph.replay()


@contextmanager
def _generators_in_turn(
    device: torch.device, generators: Sequence[torch.Generator], seeds: Sequence[int | None]
) -> Iterator[None]:
    """Inside, seeding takes the next of the generators: each keeps its own place in its own numbers."""
    default = torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
    before = default.graphsafe_get_state()
    turn, draws = iter(generators), iter(seeds)

    def take(seed: int, unit: int, micro_batch: int) -> None:
        # One of an optimizer is not taken: its update would not be captured if it drew.
        if unit >= 0 and next(draws) is not None:
            default.graphsafe_set_state(next(turn))

    try:
        with seeded_by(take):
            yield
    finally:
        default.graphsafe_set_state(before)


@contextmanager
def _no_cast_is_cached() -> Iterator[None]:
    """Inside, autocast keeps no weights that it has cast: a graph would go on with them."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


class _Streams:
    """A stream of its own for every stage, from where the present one is."""

    def __init__(self, streams: Sequence[torch.cuda.Stream]) -> None:
        self.streams = streams
        for stream in streams:
            stream.wait_stream(torch.cuda.current_stream(stream.device))

    def of(self, stage: int) -> AbstractContextManager[None]:
        return torch.cuda.stream(self.streams[stage % len(self.streams)])

    def join(self) -> None:
        for stream in self.streams:
            torch.cuda.current_stream(stream.device).wait_stream(stream)
