"""What of a GPU's figures can be had without one: operations of a tick, the host's time of a step, live bytes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from petra_zoo.bench.gpu.device import MIB, seconds_of
from petra_zoo.bench.gpu.kernels import Kernels
from petra_zoo.bench.gpu.ticks import TickCase, Ticks
from petra_zoo.bench.gpu.ways import CHECKPOINTED, PLAIN, Network, find_way
from petra_zoo.bench.turns import median_ratio, take_turns
from petra_zoo.models.training_memory import step_bytes
from petra_zoo.reversible import StreamKind
from petra_zoo.strict_json import JsonObject

_CPU = torch.device("cpu")
_MEMORIES = ("plain", "reversible")


def operations_of_a_tick(
    network: str, methods: Sequence[str], streams: StreamKind = "auto", image: int = 32
) -> JsonObject:
    """Operations dispatched in a tick of four stages under bf16 autocast, whatever the size of the images."""

    found: JsonObject = {}
    for method in methods:
        ticks = Ticks(TickCase(network, image, 2, method, streams=streams, capture="off"), _CPU)
        with Kernels() as kernels:
            ticks.tick()
        found[method] = kernels.operations
    return found


def host_time(network: Network, rounds: int) -> JsonObject:
    """A step on two images of 32x32, float32, over timm's: little arithmetic, so what the host does weighs most."""
    images = torch.randn(2, 3, 32, 32)
    labels = torch.zeros(2, dtype=torch.long)
    names = {"plain": "petra-zoo, plain", "reversible": "petra-zoo, reversible", "checkpointed": CHECKPOINTED}
    models = {"timm": _model(network, PLAIN), **{word: _model(network, name) for word, name in names.items()}}
    for model in models.values():  # channels_last is for GPUs; torch 2.15 corrupts memory with it on the CPU
        model.to(memory_format=torch.contiguous_format)
    timers = {word: partial(seconds_of, partial(_step, model, images, labels), _CPU) for word, model in models.items()}
    seconds = take_turns(timers, rounds, warm_up=2)
    return {f"{word}_over_timm": median_ratio(seconds[word], seconds["timm"]) for word in names}


def _step(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    F.cross_entropy(model(images), labels).backward()
    model.zero_grad(set_to_none=True)


def _model(network: Network, name: str) -> nn.Module:
    return find_way(name).build(network, _CPU)


def moved_gib(network: Network, batch: int = 64) -> JsonObject:
    """GiB that a step in bfloat16 reads and writes, counted on the meta device."""

    def moved(name: str) -> float:
        model = _model(network, name).to(torch.bfloat16).to("meta")
        images = torch.empty(batch, 3, network.image, network.image, dtype=torch.bfloat16, device="meta")
        labels = torch.zeros(batch, dtype=torch.long, device="meta")
        _step(model, images, labels)  # what happens once
        with Kernels() as kernels:
            _step(model, images, labels)
        return kernels.moved / 2**30

    names = {"timm": PLAIN, "checkpointed": CHECKPOINTED, **{word: f"petra-zoo, {word}" for word in _MEMORIES}}
    found = {word: moved(name) for word, name in names.items()}
    return {
        **found,
        "plain_over_timm": found["plain"] / found["timm"],
        "reversible_over_checkpointed": found["reversible"] / found["checkpointed"],
    }


def live_mib(network: Network) -> JsonObject:
    """Peak live MiB per image of a step in float32, counted on the meta device."""

    def peak(model: nn.Module) -> float:
        return step_bytes(model, (3, network.image, network.image)).peak / MIB

    found = {"timm": peak(_model(network, PLAIN)), "checkpointed": peak(_model(network, CHECKPOINTED))}
    for memory in _MEMORIES:
        found[memory] = peak(_model(network, f"petra-zoo, {memory}"))
    return {**found, "over_checkpointed": found["reversible"] / found["checkpointed"]}
