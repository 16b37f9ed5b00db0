"""Activation memory computed without running a step, against live bytes counted in one that runs."""

import pytest
import timm
import torch

import petra_zoo.models
from petra_zoo.models.training_memory import activation_memory
from petra_zoo.reversible import LiveBytes

TINY = {"layers": (2, 2, 2, 2), "channels": (8, 8, 8, 8), "num_classes": 10}
MODES = {"plain": "plain", "checkpointed": "recompute", "reversible": "reversible"}


def bytes_per_image(model: petra_zoo.models.PetraRevNet, mode: str, size: int) -> float:
    """What 16 more images add to the peak of a step that runs on the CPU."""
    model.set_memory(mode)
    peaks = []
    for batch in (32, 48):
        images = torch.randn(batch, 3, size, size)
        with LiveBytes([images, *model.parameters(), *model.buffers()]) as memory:
            model(images).sum().backward()
        peaks.append(memory.peak)
        model.zero_grad(set_to_none=True)
    return (peaks[1] - peaks[0]) / 16


@pytest.mark.parametrize("coupling", [1.0, 0.0])
@pytest.mark.parametrize("mode", MODES)
def test_it_is_what_a_real_step_needs(mode: str, coupling: float) -> None:
    model = timm.create_model("petra_revnet18_cifar", coupling=coupling, **TINY).train()
    computed = getattr(activation_memory(model, (3, 16, 16)), mode)
    assert computed == pytest.approx(bytes_per_image(model, MODES[mode], 16), rel=0.01)


@pytest.mark.slow
def test_more_reversible_blocks_need_no_more_memory() -> None:
    shallow, deep = (
        activation_memory(timm.create_model("petra_revnet18_cifar", **TINY | {"layers": (n,) * 4}), (3, 32, 32))
        for n in (4, 8)
    )
    assert deep.reversible == pytest.approx(shallow.reversible, rel=0.01)
    assert deep.plain > 1.5 * shallow.plain
    assert deep.plain > 1.4 * deep.checkpointed > 0


def test_the_model_stays_as_it_is() -> None:
    model = timm.create_model("petra_revnet_tiny").eval()
    activation_memory(model, (3, 8, 8))
    assert not model.training
    assert model.memory == "reversible"
    assert all(p.grad is None and p.device.type == "cpu" for p in model.parameters())
