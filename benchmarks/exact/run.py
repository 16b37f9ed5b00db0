"""Exact inversion at g = 2**-m: what it stores, what it costs, and what bfloat16 does to the inverse without it.

    python benchmarks/exact/run.py             # a few minutes of one core
    python benchmarks/exact/run.py --table     # README.md from results.json

Bytes are live ones on the meta device, by the difference of two depths. Steps are forward and backward, in turn, in
process time. Gradients of a reversible step under autocast are compared with those of the same network that stores its
activations, whose own distance from float32 stands beside.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from petra_zoo.machine import processor
from petra_zoo.models.reversible_sequential import ReversibleSequential
from petra_zoo.reversible import LiveBytes

RESULTS, README = (Path(__file__).with_name(name) for name in ("results.json", "README.md"))
BITS = (0, 1, 2, 3, 4, 8)
TURNS = 9
SPACINGS = (1, 2, 3, 4, 6, 8, 12, 24)
SEEDS = 3


class Tokens(nn.Module):
    """The MLP block of a transformer [B, T, C]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm, self.act = nn.LayerNorm(channels), nn.GELU()
        self.fc1, self.fc2 = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.fc2(self.act(self.fc1(self.norm(x))))
        return out


class Images(nn.Module):
    """The basic block of a ResNet [B, C, H, W], its last norm as after training."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        nn.init.constant_(self.bn2.weight, 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


KINDS: dict[str, Callable[[int], nn.Module]] = {"transformer": Tokens, "resnet": Images}
SHAPES = {"transformer": (8, 64, 128), "resnet": (8, 32, 16, 16)}
SMALL = {"transformer": (4, 12, 32), "resnet": (4, 12, 8, 8)}


def network(kind: str, channels: int, depth: int, g: float, seed: int = 0, **kwargs: Any) -> ReversibleSequential:
    torch.manual_seed(seed)
    blocks = [KINDS[kind](channels) for _ in range(depth)]
    return ReversibleSequential(blocks, coupling=g, gain=1.0 + g, **kwargs)


def channels_of(kind: str, shape: tuple[int, ...]) -> int:
    return shape[2] if kind == "transformer" else shape[1]


def stored(bits: int, exact: bool) -> float:
    """Bytes that a unit adds to what is stored, in parts of a float32 stream."""
    shape = SHAPES["transformer"]

    def live(depth: int) -> int:
        model = network("transformer", shape[2], depth, 2.0**-bits, exact=exact).to("meta")
        x = torch.empty(shape, device="meta")
        with LiveBytes([x, *model.parameters(), *model.buffers()]) as memory:
            y = model(x)
            torch.empty(0, device="meta")
            now = memory.now
        del y
        return now

    return (live(12) - live(4)) / 8 / (4 * torch.Size(shape).numel())


def stored_both(bits: int) -> dict[str, Any]:
    return {"bits": bits, "exact": stored(bits, True), "plain": stored(bits, False)}


def slowdown(kind: str, bits: int) -> dict[str, Any]:
    """Step time of the exact network over that of the same one that is not."""
    shape = SHAPES[kind]
    models = [network(kind, channels_of(kind, shape), 8, 2.0**-bits, exact=exact) for exact in (False, True)]
    x = torch.randn(shape)
    seconds: list[list[float]] = [[], []]
    for turn in range(TURNS + 1):
        for i in (0, 1) if turn % 2 else (1, 0):
            start = time.process_time()
            models[i](x).square().mean().backward()
            seconds[i].append(time.process_time() - start)
    ratios = [exact / plain for plain, exact in zip(seconds[0][1:], seconds[1][1:], strict=True)]
    return {
        "network": kind,
        "bits": bits,
        "ratio": statistics.median(ratios),
        "quartiles": [statistics.quantiles(ratios, n=4)[i] for i in (0, 2)],
        "seconds": statistics.median(seconds[0][1:]),
    }


def gradient(model: ReversibleSequential, x: Tensor, memory: str, autocast: bool = True) -> Tensor:
    setattr(model, "memory", memory)  # noqa: B010 - one of three words
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = model(x)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(3))
    model.zero_grad()
    (y.float() * weights).sum().backward()
    return torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])


def off(x: Tensor, y: Tensor) -> float:
    return float((x - y).norm() / y.norm())


def noise(kind: str, g: float) -> dict[str, Any]:
    """Relative errors of gradients under autocast, by the spacing of anchors in a run of 24 blocks."""
    shape = SMALL[kind]
    found: dict[str, list[float]] = {str(every): [] for every in SPACINGS}
    own = []
    for seed in range(SEEDS):
        model = network(kind, channels_of(kind, shape), 24, g, seed)
        x = torch.randn(shape)
        plain = gradient(model, x, "plain")
        own.append(off(plain, gradient(model, x, "plain", autocast=False)))
        for every in SPACINGS:
            model.spacing = lambda units=1, every=every: every  # as if nobody knew of 16 bits
            found[str(every)].append(off(gradient(model, x, "reversible"), plain))
    medians = {every: statistics.median(errors) for every, errors in found.items()}
    return {"network": kind, "g": g, "of_bfloat16": statistics.median(own), "by_spacing": medians}


def table(found: dict[str, Any]) -> str:
    lines = ["| g | bits | stored per unit, of a float32 stream | without exact |", "|---|---|---|---|"]
    lines += [f"| {2.0 ** -r['bits']:g} | {r['bits']} | {r['exact']:.4f} | {r['plain']:.4f} |" for r in found["stored"]]
    lines += ["", "| network | g | step time over that without exact |", "|---|---|---|"]
    lines += [f"| {r['network']} | {2.0 ** -r['bits']:g} | {r['ratio']:.2f} |" for r in found["steps"]]
    heads = " | ".join(f"every {every}" for every in SPACINGS)
    lines += ["", f"| network | g | bfloat16 itself | {heads} |", "|---" * (3 + len(SPACINGS)) + "|"]
    for r in found["autocast"]:
        errors = " | ".join(f"{r['by_spacing'][str(every)]:.1e}" for every in SPACINGS)
        lines.append(f"| {r['network']} | {r['g']:g} | {r['of_bfloat16']:.1e} | {errors} |")
    return "\n".join(lines)


def page(found: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return f"""# Exact inversion at g = 2^-m

What a unit adds to what is stored, step time (median of {TURNS} pairs of steps in turn, process time, one thread), and
relative errors of the gradients of a reversible step under bfloat16 autocast without exact inversion, 24 blocks, by the
spacing of anchors (median of {SEEDS} seeds; with exact inversion they are those of the network that stores its
activations). {found["machine"]}; {versions}.

<!-- rows -->
{table(found)}
<!-- end of rows -->

```
{found["command"]}
```
"""


def measure() -> None:
    """Does what results.json lacks, run by run."""
    found: dict[str, Any] = {"stored": [], "steps": [], "autocast": []}
    if RESULTS.exists():
        found = json.loads(RESULTS.read_text(encoding="utf-8"))
    found |= {
        "machine": f"{processor()}, one thread",
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__},
        "command": "python benchmarks/exact/run.py",
    }
    runs: dict[str, list[Callable[[], dict[str, Any]]]] = {
        "stored": [partial(stored_both, bits) for bits in BITS],
        "steps": [partial(slowdown, kind, bits) for kind in KINDS for bits in (0, 1, 3, 4)],
        "autocast": [partial(noise, kind, 2.0**-bits) for kind in KINDS for bits in (1, 2, 3, 4)],
    }
    for name, jobs in runs.items():
        for job in jobs[len(found[name]) :]:
            found[name].append(job())
            RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="write README.md from results.json, measure nothing")
    if not parser.parse_args().table:
        torch.set_num_threads(1)
        measure()
    README.write_text(page(json.loads(RESULTS.read_text(encoding="utf-8"))), encoding="utf-8")


if __name__ == "__main__":
    main()
