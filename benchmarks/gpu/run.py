"""One GPU: what a training step and a tick cost, in kernel time, host time and memory.

    python benchmarks/gpu/run.py --output benchmarks/gpu/results.json        # about 2 minutes on one H200
    python benchmarks/gpu/run.py --size 32 --batches 2,4 --networks 18 --ticks petra_revnet_tiny:16:4:2   # any CPU

Steps are forward and backward under bf16 autocast, without an optimizer: the same images, the same loss. ``eager``: the
median of synchronised steps. ``graph``: the same step captured as a CUDA graph and replayed, so what its kernels cost.
MiB per image is the slope of the peak between two batch sizes, in which weights and their gradients cancel. The
generators' states cannot be read while a graph is captured, so they are left out for that; nothing here draws.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import petra_zoo  # registers the models
from petra_zoo.petra import Layout, Optimization, Pipeline
from petra_zoo.reversible import replay

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
METHODS = ("backprop", "reversible", "petra", "dsp", "delayed")


def contenders(depths: list[str]) -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """Name and network: timm's ResNets plain and checkpointed, the reversible ones of the same parameters."""

    def checkpointed(name: str) -> nn.Module:
        model = timm.create_model(name)
        model.set_grad_checkpointing(True)
        return model

    def coupled(name: str, memory: str) -> nn.Module:
        model = timm.create_model(name)
        model.set_memory(memory)
        return model

    for depth in depths:
        yield f"resnet{depth} plain", lambda n=f"resnet{depth}": timm.create_model(n)
        yield f"resnet{depth} checkpointed", lambda n=f"resnet{depth}": checkpointed(n)
        for memory in ("plain", "reversible"):
            name = f"petra_revnet{depth}"
            yield f"{name} {memory}", lambda n=name, m=memory: coupled(n, m)


def milliseconds(step: Callable[[], object], times: int) -> float:
    """Median wall time of a synchronised call."""
    found = []
    for _ in range(times):
        synchronize()
        start = time.perf_counter()
        step()
        synchronize()
        found.append(1e3 * (time.perf_counter() - start))
    return round(statistics.median(found), 2)


def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


def measure_step(build: Callable[[], nn.Module], batches: list[int], size: int, times: int) -> dict[str, Any]:
    """Eager and captured time at the smaller batch, and the slope of the peak."""
    row: dict[str, Any] = {}
    peaks = []
    for batch in batches:
        torch.manual_seed(0)
        model = build().to(DEVICE, memory_format=torch.channels_last).train()
        images = torch.randn(batch, 3, size, size, device=DEVICE).contiguous(memory_format=torch.channels_last)
        labels = torch.randint(0, 1000, (batch,), device=DEVICE)

        def step(model: nn.Module = model, images: Tensor = images, labels: Tensor = labels) -> Tensor:
            # Autocast's cache of cast weights would outlive a capture.
            with torch.autocast(DEVICE.type, dtype=torch.bfloat16, cache_enabled=False):
                loss = F.cross_entropy(model(images), labels)
            loss.backward()
            model.zero_grad(set_to_none=True)
            return loss

        stream = torch.cuda.Stream() if CUDA else None
        with torch.cuda.stream(stream):
            for _ in range(3 if CUDA else 1):
                step()
        synchronize()
        before = torch.cuda.memory_allocated() if CUDA else 0
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
        row[f"eager_ms_{batch}"] = milliseconds(step, times)
        peaks.append(torch.cuda.max_memory_allocated() - before if CUDA else 0)
        if CUDA and batch == batches[0]:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                row["loss"] = step()
            row[f"graph_ms_{batch}"] = milliseconds(graph.replay, times + 2)
            row["loss"] = round(float(row["loss"].detach()), 4)
            del graph
        del model, images, labels, step
        if CUDA:
            torch.cuda.empty_cache()
    if CUDA:
        row["mib_per_image"] = round((peaks[-1] - peaks[0]) / (batches[-1] - batches[0]) / 2**20, 2)
    return row


def measure_tick(name: str, size: int, batch: int, stages: int, method: str, times: int) -> dict[str, Any]:
    """A tick of the pipeline in one process: wall time, time on the host, peak above what was there before."""
    gc.collect()
    before = torch.cuda.memory_allocated() if CUDA else 0
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=100).to(DEVICE, memory_format=torch.channels_last).train()
    pipeline = Pipeline(
        model,
        Layout.of(model, stages, method=method, input_size=(3, size, size)),
        method=method,
        optimization=Optimization(lambda named: torch.optim.SGD([p for _, p in named], 0.01, momentum=0.9)),
        autocast=torch.bfloat16,
    )
    images = torch.randn(batch, 3, size, size, device=DEVICE).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 100, (batch,), device=DEVICE)
    for _ in range(2 * stages + 2):
        pipeline.step(images, labels)
    synchronize()
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    row: dict[str, Any] = {"tick_ms": milliseconds(lambda: pipeline.step(images, labels), times)}
    start = time.perf_counter()
    for _ in range(times):
        pipeline.step(images, labels)
    row["host_ms"] = round(1e3 * (time.perf_counter() - start) / times, 2)
    synchronize()
    row["peak_mib"] = round((torch.cuda.max_memory_allocated() - before) / 2**20) if CUDA else 0
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default="50,152", help="depths of ResNets")
    parser.add_argument("--batches", default="64,192", help="the smaller is timed")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--ticks", default="petra_revnet50:224:64:4,petra_revnet18_cifar:32:128:4")
    parser.add_argument("--times", type=int, default=8 if CUDA else 2)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.backends.cudnn.benchmark = True
    rows = []
    with mock.patch.object(replay, "generator_states", return_value={}):
        for name, build in contenders([depth for depth in options.networks.split(",") if depth]):
            batches = [int(batch) for batch in options.batches.split(",")]
            rows.append({"step": name, **measure_step(build, batches, options.size, options.times)})
            print(json.dumps(rows[-1]), flush=True)
    for case in [case for case in options.ticks.split(",") if case]:
        name, *numbers = case.split(":")
        for method in METHODS:
            size, batch, stages = map(int, numbers)
            rows.append(
                {"tick": case, "method": method, **measure_tick(name, size, batch, stages, method, options.times)}
            )
            print(json.dumps(rows[-1]), flush=True)
    machine = {
        "device": torch.cuda.get_device_name() if CUDA else platform.processor(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "petra_zoo": petra_zoo.__version__,
        "cudnn": torch.backends.cudnn.version() if CUDA else None,
    }
    if options.output:
        arguments = {key: str(value) for key, value in vars(options).items() if key != "output"}
        options.output.write_text(json.dumps({**machine, "arguments": arguments, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
