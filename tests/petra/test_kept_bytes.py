"""What PETRA keeps between ticks, in bytes: as it was fed and as streams are carried, and as the planner says."""

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from petra_zoo.petra import Pipeline, measure
from petra_zoo.petra.footprint import keeps_irreversible_inputs

STAGES = 4


def normalise(images: Tensor) -> Tensor:
    return images.float().div(255.0).sub(0.5)


def kept_bytes(pipeline: Pipeline) -> list[int]:
    """Of every stage."""
    return [sum(x.nbytes for fifo in stage.kept for streams in fifo for x in streams) for stage in pipeline.stages]


def filled(model: nn.Module, size: int, modern: bool) -> Pipeline:
    """A full pipeline, of two images each: in float32, or with bytes fed and bfloat16 computed."""
    settings: dict[str, Any] = {"prepare": normalise, "autocast": torch.bfloat16} if modern else {}
    pipeline = Pipeline(model.train(), STAGES, **settings)
    images = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)
    for _ in range(2 * STAGES):
        pipeline.step(images if modern else normalise(images), torch.tensor([0, 1]))
    return pipeline


def check_half(name: str, size: int) -> None:
    modern, classic = (sum(kept_bytes(filled(timm.create_model(name), size, modern))) for modern in (True, False))
    assert 0 < modern <= 0.5 * classic


def test_bytes_and_narrow_streams_are_half_of_what_waits() -> None:
    check_half("petra_revnet_tiny", 8)


@pytest.mark.slow
def test_bytes_and_narrow_streams_are_half_of_what_waits_in_a_resnet50() -> None:
    check_half("petra_revnet50", 32)


def test_the_planner_counts_what_waits() -> None:
    model = timm.create_model("petra_revnet_tiny")
    pipeline = filled(model, 8, modern=True)
    profile = measure(model, 2, (3, 8, 8), repeats=1, autocast=torch.bfloat16, fed=torch.uint8)
    planned = []
    for stage in pipeline.stages:
        units = profile.units[stage.first_unit :][: len(stage.units)]
        waiting = 2 * (STAGES - 1 - stage.index)
        planned.append(keeps_irreversible_inputs(units, waiting, 1).inputs)
    assert kept_bytes(pipeline) == planned
    assert planned[0] > 0
