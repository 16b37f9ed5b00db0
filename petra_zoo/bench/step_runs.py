"""What a worker measures of a training step: its time beside its references', its memory, its batch norms."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version

import torch
from torch import Tensor, nn

from petra_zoo.bench.memory_transformers import PLAIN, TransformerStep, build_transformer
from petra_zoo.bench.step_contenders import build_contender
from petra_zoo.bench.steps import FAMILY, LIBRARIES, REFERENCES, StepShape
from petra_zoo.bench.turns import median_ratio, take_turns
from petra_zoo.reversible import LiveBytes
from petra_zoo.strict_json import JsonObject

_WARM_UP = 2  # steps


def measure_step(contender: str, shape: StepShape, rounds: int) -> JsonObject:
    """One contender beside the references of its family, and what a further block costs in memory."""
    warnings.filterwarnings("ignore", message="TypedStorage is deprecated")  # memcnn
    references = REFERENCES[FAMILY[contender]]
    names = dict.fromkeys([contender, *references.values()])
    made = {name: build_contender(name, shape) for name in names}
    seconds = take_turns({name: _timed(*made[name]) for name in names}, rounds, warm_up=_WARM_UP)
    deeper = build_contender(contender, replace(shape, blocks=2 * shape.blocks))
    more = peak_step_bytes(*deeper) - peak_step_bytes(*made[contender])
    return {
        "step_ms": 1e3 * statistics.median(seconds[contender]),
        "step_ms_best": 1e3 * min(seconds[contender]),
        **{over: median_ratio(seconds[contender], seconds[name]) for over, name in references.items()},
        "batch_norm_updates": norm_updates(*made[contender]),
        "bytes_per_block": more / shape.blocks,
        **({"release": version(contender)} if contender in LIBRARIES else {}),
    }


def measure_transformer_step(step: TransformerStep, batch_size: int, rounds: int) -> JsonObject:
    """A whole network's step beside that of timm's plain one, in float32."""
    torch.manual_seed(0)
    images = torch.randn(batch_size, 3, step.img_size, step.img_size)
    made = {way: build_transformer(replace(step, way=way)).train() for way in dict.fromkeys((step.way, PLAIN))}
    seconds = take_turns({way: _timed(model, images) for way, model in made.items()}, rounds, warm_up=1)
    ratios = [own / plain for own, plain in zip(seconds[step.way], seconds[PLAIN], strict=True)]
    return {
        "step_ms": 1e3 * statistics.median(seconds[step.way]),
        "over_reference": statistics.median(ratios),
        "least_over_reference": min(ratios),
        "most_over_reference": max(ratios),
    }


def _timed(model: nn.Module, x: Tensor) -> Callable[[], float]:
    def step() -> float:
        start = time.perf_counter()
        training_step(model, x)
        return time.perf_counter() - start

    return step


def training_step(model: nn.Module, x: Tensor) -> Tensor:
    """Forward, loss and backward; gives the loss."""
    # The reversible libraries' functions need an input with a gradient, as it comes from a stem.
    loss = model(x.detach().requires_grad_()).square().mean()
    loss.backward()
    return loss.detach()


def peak_step_bytes(model: nn.Module, x: Tensor) -> int:
    """Peak live bytes of a training step; parameters, their gradients, buffers and the input apart."""
    training_step(model, x)  # gradients exist from here on
    apart = [t for p in model.parameters() for t in (p, p.grad) if t is not None]
    with LiveBytes([x, *apart, *model.buffers()]) as memory:
        training_step(model, x)
    return memory.peak


def norm_updates(model: nn.Module, x: Tensor) -> int:
    """Largest number of times that a batch norm updates its running statistics in one step."""

    def counts() -> dict[str, int]:
        return {name: int(b) for name, b in model.named_buffers() if name.endswith("num_batches_tracked")}

    before = counts()
    training_step(model, x)
    return max(count - before[name] for name, count in counts().items())
