"""Captured ticks on a GPU: the bits of those that are not."""

from typing import Any

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import nn

import petra_zoo  # noqa: F401 - registers the models
from petra_zoo.petra import Layout, Optimization, Pipeline, find_method
from tests.petra.test_captured import same

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
SIZE = (3, 16, 16)


def optimizer(name: str) -> Any:
    return lambda named: create_optimizer_v2([p for _, p in named], name, lr=0.01, momentum=0.9)


def cosine(optimizer: torch.optim.Optimizer) -> CosineLRScheduler:
    return CosineLRScheduler(optimizer, t_initial=40, lr_min=1e-4, warmup_t=5, t_in_epochs=False)


def trained(
    method: str, stages: int, k: int, opt: str, graphs: Any, **kwargs: Any
) -> tuple[list[Any], dict[str, Any], Any]:
    torch.manual_seed(0)
    model = timm.create_model("petra_revnet_tiny", num_classes=10, drop_path_rate=0.2).cuda().train()
    pipeline = Pipeline(
        model,
        Layout.of(model, stages, method=find_method(method), input_size=SIZE),
        method=method,
        optimization=Optimization(optimizer(opt), cosine, k, clip_grad=1.0),
        graphs=graphs,
        **kwargs,
    )
    generator = torch.Generator().manual_seed(1)
    outputs = []
    for _ in range(24):
        images, labels = torch.randn(8, *SIZE, generator=generator), torch.randint(0, 10, (8,), generator=generator)
        outputs.append(pipeline.step(images.cuda(), labels.cuda()))
    outputs += pipeline.drain()
    return [vars(output) for output in outputs if output.loss is not None], model.state_dict(), pipeline.captured


@needs_cuda
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize(
    ("method", "stages", "k", "opt"),
    [
        ("petra", 4, 1, "sgd"),
        ("petra", 3, 2, "muon"),
        ("petra", 3, 1, "lion"),
        ("dsp", 3, 2, "adamw"),
        ("reversible", 2, 1, "adamw"),
        ("backprop", 1, 2, "sgd"),
    ],
)
def test_captured_ticks_compute_the_same_bits(
    method: str, stages: int, k: int, opt: str, autocast: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    ours, state, captured = trained(method, stages, k, opt, "auto", autocast=autocast)
    expected, plain, _ = trained(method, stages, k, opt, "off", autocast=autocast)
    assert captured.replayed > 5, captured.refusal
    assert same(ours, expected)
    assert same(state, plain)


@needs_cuda
def test_a_capture_that_fails_leaves_training_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def looks_while_capturing(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if torch.cuda.is_current_stream_capturing():
            logits.sum().item()
        return nn.functional.cross_entropy(logits, labels)

    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    ours, state, captured = trained("petra", 3, 1, "sgd", "auto", loss=looks_while_capturing)
    expected, plain, _ = trained("petra", 3, 1, "sgd", "off")
    assert captured.refusal
    assert same(ours, expected)
    assert same(state, plain)
