"""Time and memory of a call on a device: a GPU's own clock and allocator, or, to try everything out, the CPU's."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

import torch
from torch import Tensor

from petra_zoo.reversible import LiveBytes

MIB = 2**20
Step = Callable[[], Tensor]


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """From the call to the end of all that it starts on the device; a GPU is idle before and after."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def busy_seconds_of(replay: Callable[[], None]) -> float:
    """Of work on the current CUDA stream, by the GPU's clock: what else the host does meanwhile has no part in it."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """The most that a call holds above what was there before.

    On a GPU what the allocator has given out, workspaces included; on the CPU the live bytes of tensors.
    """
    gc.collect()
    if device.type != "cuda":
        with LiveBytes() as memory:
            step()
        return memory.peak
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def captured(step: Step, stream: torch.cuda.Stream) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A step as a CUDA graph, and the tensor in which each replay leaves its loss.

    Args:
        step: has run on the stream before: what happens once must be over.
        stream: autograd stays on the stream of a parameter's first gradient.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        loss = step()
    return graph, loss


def synchronize(device: torch.device) -> None:
    """Waits until a GPU has nothing to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release(device: torch.device) -> None:
    """Gives back what is no longer used, so that the next measurement finds the device as the last one did."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
