"""Time, memory and batch-norm updates of a training step through 8 residual blocks: ours beside the alternatives.

    pip install --no-deps -r benchmarks/reversible_step/requirements.txt
    OMP_NUM_THREADS=1 python benchmarks/reversible_step/run.py

Two families, timed in one interleaved run on one thread. `streams`: the coupled block (a, b) -> (b, a + F(b)) on two
streams, for every library (contenders.py). `layer`: a ResNet layer as users meet it, timm's own blocks against the
zoo's `CoupledLayer` on the same weights, with plain memory, with recomputation of every block, and reversible.

A step is forward, loss and backward. Every round runs every contender once, in a new order; a ratio is taken within a
round (to the contender's reference in the same round) and the median over rounds is reported, so that a machine that
slows down for a while slows all of them. Peak live bytes leave parameters, their gradients and buffers apart.
"""

import argparse
import copy
import json
import os
import platform
import random
import statistics
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from contenders import CONTENDERS, build_branches
from timm.models.resnet import BasicBlock
from torch import Tensor, nn

from petra_zoo.models import CoupledLayer
from petra_zoo.reversible import CoupledUnit, LiveBytes, backpropagate

RESULTS = Path(__file__).with_name("results.json")
REFERENCES = {"streams": "plain", "layer": "timm"}


class OurStreams(nn.Module):
    """The same blocks as the outside contenders, through `petra_zoo.reversible`."""

    def __init__(self, depth: int, channels: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(build_branches(depth, channels))
        self.units = [
            CoupledUnit(str(i), f, branch=f, activate=lambda b: b, coupling=lambda: 1.0)
            for i, f in enumerate(self.branches)
        ]

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=1)
        b, a = backpropagate(self.units, (b, a))
        return torch.cat((a, b), dim=1)


def timm_layer(depth: int, channels: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(BasicBlock(channels, channels) for _ in range(depth)))


def our_layer(depth: int, channels: int, memory: str) -> nn.Module:
    layer = CoupledLayer(*timm_layer(depth, channels), behind_stem=True)
    layer.memory = memory
    return layer


def build(depth: int, channels: int) -> dict[tuple[str, str], nn.Module]:
    models: dict[tuple[str, str], nn.Module] = {
        ("streams", name): make(depth, channels) for name, make in CONTENDERS.items()
    }
    models["streams", "petra-zoo"] = OurStreams(depth, channels)
    models["layer", "timm"] = timm_layer(depth, channels)
    for memory in ("plain", "recompute", "reversible"):
        models["layer", f"petra-zoo {memory}"] = our_layer(depth, channels, memory)
    return models


def make_input(family: str, batch: int, channels: int, size: int) -> Tensor:
    width = 2 * channels if family == "streams" else channels
    x = torch.randn(batch, width, size, size, generator=torch.Generator().manual_seed(1))
    return x.relu() if family == "layer" else x


def step(model: nn.Module, x: Tensor) -> None:
    model(x.detach().requires_grad_()).square().mean().backward()


def peak_bytes(model: nn.Module, x: Tensor) -> int:
    model = copy.deepcopy(model) if not isinstance(model, OurStreams) else model
    step(model, x)  # gradients exist from here on
    apart = [t for p in model.parameters() for t in (p, p.grad) if t is not None]
    with LiveBytes([x, *apart, *model.buffers()]) as memory:
        step(model, x)
    return memory.peak


def updates_per_step(model: nn.Module, x: Tensor) -> int:
    """Largest number of times a batch norm updated its running statistics in one step."""
    before = {n: int(b) for n, b in model.named_buffers() if n.endswith("num_batches_tracked")}
    step(model, x)
    after = {n: int(b) for n, b in model.named_buffers() if n.endswith("num_batches_tracked")}
    return max(after[name] - before[name] for name in before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--channels", type=int, default=32)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message="TypedStorage is deprecated")  # memcnn
    torch.set_num_threads(1)

    models = build(8, options.channels)
    inputs = {family: make_input(family, options.batch, options.channels, options.size) for family in REFERENCES}
    times: dict[tuple[str, str], list[float]] = {key: [] for key in models}
    order = list(models)
    for i in range(options.rounds + 2):
        random.Random(i).shuffle(order)
        for key in order:
            start = time.perf_counter()
            step(models[key], inputs[key[0]])
            if i >= 2:  # two rounds to warm up
                times[key].append(time.perf_counter() - start)

    deeper = build(16, options.channels)
    rows: list[dict[str, Any]] = []
    for (family, name), model in models.items():
        x = inputs[family]
        reference = times[family, REFERENCES[family]]
        ratios = [t / r for t, r in zip(times[family, name], reference, strict=True)]
        row = {
            "family": family,
            "contender": name,
            "step_ms_best": 1e3 * min(times[family, name]),
            "step_ms_median": 1e3 * statistics.median(times[family, name]),
            "ratio_to_reference_median": statistics.median(ratios),
            "batch_norm_updates": updates_per_step(model, x),
            "peak_mib_8": peak_bytes(model, x) / 2**20,
            "peak_mib_16": peak_bytes(deeper[family, name], x) / 2**20,
        }
        rows.append(row)
    plain = times["layer", "petra-zoo plain"]
    ours = times["layer", "petra-zoo reversible"]
    over_plain = statistics.median(a / b for a, b in zip(ours, plain, strict=True))
    result = {
        "command": "OMP_NUM_THREADS=1 python benchmarks/reversible_step/run.py",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, 1 thread; load average {os.getloadavg()[0]:.2f}",
        "versions": {name: version(name) for name in ("torch", "timm", "memcnn", "revlib")},
        "settings": {"depth": 8, **{k: v for k, v in vars(options).items() if k != "output"}},
        "reversible_over_the_same_layer_with_plain_memory": over_plain,
        "rows": rows,
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"layer: reversible over plain memory {over_plain:.3f} (target 1.25); over timm's blocks: see the table")
    print("| family | contender | step over reference | best ms | median ms | BN updates | MiB at 8 | MiB at 16 |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['family']} | {row['contender']} | {row['ratio_to_reference_median']:.2f} "
            f"| {row['step_ms_best']:.1f} | {row['step_ms_median']:.1f} | {row['batch_norm_updates']} "
            f"| {row['peak_mib_8']:.1f} | {row['peak_mib_16']:.1f} |"
        )


if __name__ == "__main__":
    main()
