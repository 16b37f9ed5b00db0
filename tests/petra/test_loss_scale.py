"""Training in float16: gradients that would vanish there, and those that overflow."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from petra_zoo.errors import UserError
from petra_zoo.petra import METHODS, Pipeline
from petra_zoo.petra import loss_scale as module
from petra_zoo.petra.loss_scale import NoScale
from tests.petra.fake_graph import FakeGraph
from tests.petra.test_pipeline import batches, make_model, make_pipeline, run, sgd

DATA = batches(4, size=16, dtype=torch.float32)


def small_loss(factor: float, logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels) * factor


def gradients(method: str, autocast: torch.dtype | None, factor: float = 1.0, stages: int = 4) -> dict[str, Tensor]:
    """Mean gradient of all micro-batches at fixed parameters, over the loss's factor."""
    model = make_model(torch.float32)
    before = copy.deepcopy(model.state_dict())
    pipeline = make_pipeline(
        model,
        stages,
        method=method,
        accumulation_steps=len(DATA),
        optimizer=sgd(1.0 / factor, momentum=0.0),
        autocast=autocast,
        loss=partial(small_loss, factor),
    )
    run(pipeline, DATA)
    assert pipeline.skipped == 0, pipeline.skipped
    return {name: before[name] - p.detach() for name, p in model.named_parameters()}


def error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    difference, size = (torch.cat([x.flatten() for x in y]) for y in (
        [found[name] - x for name, x in expected.items()], list(expected.values())))  # fmt: skip
    return float(difference.norm() / size.norm())


@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_closer_to_float32s_than_bfloat16s_are(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    monkeypatch.setattr(module, "INITIAL", 4.0)  # these are large, and all micro-batches are to be compared
    exact, half, brain = (gradients(method, dtype) for dtype in (None, torch.float16, torch.bfloat16))
    assert error(half, exact) < 0.5 * error(brain, exact)


def test_gradients_that_would_vanish_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    small = gradients("petra", torch.float16, 2.0**-16)  # times a factor of 2^16
    monkeypatch.setattr("petra_zoo.petra.stage.scale_for", lambda autocast: NoScale())
    large, vanished = gradients("petra", torch.float16), gradients("petra", torch.float16, 2.0**-16)
    assert error(small, large) < 1e-3
    assert error(vanished, large) > 0.1


def scales(pipeline: Pipeline) -> list[int]:
    found = [stage.scale.state_dict() for stage in pipeline.stages]
    return [state["factor"] for state in found if state]


def trained(layout: int = 4, ticks: int = 12, **settings: Any) -> Pipeline:
    pipeline = make_pipeline(make_model(torch.float32), layout, autocast=torch.float16, **settings)
    for batch in batches(ticks, dtype=torch.float32):
        pipeline.step(*batch)
    return pipeline


def test_an_overflow_is_left_out_and_halves_the_factor_of_its_own_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes down of such a micro-batch is left out too, and says nothing of the factors below."""
    monkeypatch.setattr(module, "INITIAL", 64.0)
    pipeline = trained(ticks=8)
    assert pipeline.skipped == 0
    scale = pipeline.stages[2].scale
    own = scale.enlarged
    monkeypatch.setattr(
        scale, "enlarged", lambda found: tuple(None if d is None else d * torch.inf for d in own(found))
    )
    for batch in batches(3, dtype=torch.float32):
        pipeline.step(*batch)
    assert pipeline.skipped == 3
    assert scales(pipeline) == [64, 64, 8, 64]
    assert all(p.isfinite().all() for p in pipeline.model.parameters())


def test_a_factor_that_overflows_comes_down_until_it_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "INITIAL", module.MOST)
    pipeline = trained(1, ticks=14, method="reversible")
    assert 0 < pipeline.skipped < 14
    assert scales(pipeline) == [module.MOST / 2**pipeline.skipped]


def test_a_factor_grows_while_nothing_overflows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "INITIAL", 16.0)
    monkeypatch.setattr(module, "GROWS_AFTER", 3)
    assert scales(trained(1, ticks=7, method="backprop")) == [64]


def test_a_restored_pipeline_goes_on_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GROWS_AFTER", 3)
    one = trained()
    other = make_pipeline(make_model(torch.float32), 4, autocast=torch.float16)
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    assert scales(one) == scales(other) != [module.INITIAL] * 4
    for batch in DATA:
        one.step(*batch)
        other.step(*batch)
    for p, q in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(p, q)
    assert scales(one) == scales(other)


def test_captured_ticks_follow_the_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GROWS_AFTER", 3)
    one, other = (trained(2, ticks=12, graphs=graphs) for graphs in (FakeGraph, "off"))
    assert scales(one) == scales(other) != [module.INITIAL] * 2
    for p, q in zip(one.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(p, q)  # a prepared optimizer rounds otherwise


@pytest.mark.parametrize("streams", ["fixed16", "bfloat16"])
def test_streams_of_16_bits_are_refused(streams: str) -> None:
    with pytest.raises(UserError, match=f"has {streams} streams.*set streams=float32, or autocast to bfloat16"):
        make_pipeline(make_model(torch.float32, streams=streams), 4, autocast=torch.float16)
