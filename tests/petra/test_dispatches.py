"""A tick hands torch no more operations than it must: on a GPU they are kernels to launch, at the host's expense."""

from typing import Any

import pytest
import timm
import torch

from petra_zoo.petra import Optimization, Pipeline
from petra_zoo.reversible import Dispatches
from tests.petra.test_pipeline import batches, make_model, make_pipeline


def fused_sgd(named: list[tuple[str, torch.nn.Parameter]]) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for _, p in named], 0.01, momentum=0.9, fused=True)


def steady_tick(pipeline: Pipeline, batch: Any) -> Dispatches:
    while pipeline.tick < 2 * len(pipeline.stages):
        pipeline.step(*batch)
    with Dispatches() as dispatches:
        pipeline.step(*batch)
    return dispatches


@pytest.mark.parametrize(
    ("method", "streams", "most"),
    # A grid's rounding, clamping and flag are operations of their own where nothing fuses them.
    [("petra", "bfloat16", 340), ("backprop", "bfloat16", 300), ("petra", "fixed16", 660)],
)
def test_a_tick_of_a_small_network(method: str, streams: str, most: int) -> None:
    model = make_model(torch.float32, streams=streams)
    pipeline = make_pipeline(model, 4, method=method, optimizer=fused_sgd, autocast=torch.bfloat16)
    found = steady_tick(pipeline, batches(1, dtype=torch.float32)[0])
    assert found.operations <= most, found.counts.most_common(12)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "most"), [("petra", 650), ("backprop", 500)])
def test_a_tick_of_a_resnet50(method: str, most: int) -> None:
    model = timm.create_model("petra_revnet50", num_classes=10, streams="bfloat16").train()
    pipeline = Pipeline(model, 4, method=method, optimization=Optimization(fused_sgd), autocast=torch.bfloat16)
    found = steady_tick(pipeline, (torch.randn(2, 3, 32, 32), torch.tensor([1, 2])))
    assert found.operations <= most, found.counts.most_common(12)
