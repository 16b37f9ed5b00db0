"""A loss or a gradient that is not finite stops the engine, and is named."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from petra_zoo.petra import METHODS, NotFiniteError, first_not_finite
from petra_zoo.petra.finite import FiniteCheck, pooled
from tests.petra.fake_graph import FakeGraph
from tests.petra.test_pipeline import batches, make_model, make_pipeline, run


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_gradients_pool_into_a_finite_number_only_where_all_are_finite(dtype: torch.dtype, wrong: float) -> None:
    gradients = [torch.full((3, 5), 3e4, dtype=dtype), torch.empty(0, dtype=dtype), -torch.ones(70, dtype=dtype)]
    assert pooled(gradients).isfinite()
    gradients[2][66] = wrong
    gradients[2][67] = -wrong
    assert not pooled(gradients).isfinite()
    assert pooled([]).isfinite()


@pytest.mark.parametrize("method", METHODS)
def test_a_loss_that_is_not_finite_stops_in_its_tick_before_any_parameter_is_touched(method: str) -> None:
    model = make_model()
    feeds = batches(5)
    feeds[1][0][0, 0, 0, 0] = float("nan")
    pipeline = make_pipeline(model, 4, method=method)
    ticks_to_the_loss = 3 if method in ("petra", "dsp", "delayed") else 0  # a stage of local learning has its own
    for batch in feeds[: 1 + ticks_to_the_loss]:
        pipeline.step(*batch)
    with pytest.raises(NotFiniteError, match=r"the loss of stage \d is nan"):
        pipeline.step(*feeds[1 + ticks_to_the_loss])
    assert all(p.isfinite().all() for p in model.parameters())
    assert first_not_finite(model) == "bn1.running_mean", "the stem's statistics have seen the image"


def test_a_gradient_that_is_not_finite_names_the_stage_where_it_began() -> None:
    model = make_model()
    pipeline = make_pipeline(model, 4, method="backprop")
    victim = pipeline.stages[2].parameters[0][0]
    victim.register_hook(lambda gradient: gradient * float("inf"))
    before = [p.detach().clone() for p in pipeline.stages[2].parameters[0]]
    with pytest.raises(NotFiniteError, match="the gradient of stage 2's parameters is"):
        pipeline.step(*batches(1)[0])
    assert all(torch.equal(p, old) for p, old in zip(pipeline.stages[2].parameters[0], before, strict=True))


def test_a_gradient_of_any_micro_batch_of_the_window_counts() -> None:
    calls: list[int] = []

    class Blown(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Tensor:
            calls.append(1)
            return gradients[0] * (float("nan") if len(calls) == 2 else 1.0)

    pipeline = make_pipeline(
        make_model(), 3, accumulation_steps=4, loss=lambda x, y: F.cross_entropy(Blown.apply(x), y)
    )
    with pytest.raises(NotFiniteError, match="the gradient of stage 2's parameters is nan"):
        run(pipeline, batches(6))
    assert pipeline.fed == 3 + 1 + 2  # the window of the last stage ends with its fourth micro-batch


def test_a_loss_that_is_looked_at_later_counts_while_the_pipeline_drains() -> None:
    calls: list[int] = []

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        calls.append(1)
        return F.cross_entropy(logits, labels) + (float("inf") if len(calls) == 1 else 0.0)

    pipeline = make_pipeline(make_model(), 3, loss=loss)
    pipeline.settings.finite.deferred = True
    for batch in batches(2):
        pipeline.step(*batch)
    assert not calls
    with pytest.raises(NotFiniteError, match="the loss of stage 2 is inf"):
        pipeline.drain()


def test_a_stream_beyond_its_range_is_told_where_nothing_is_updated_too() -> None:
    model = make_model(torch.float32, streams="fixed16")
    model.get_parameter("bn1.weight").data.fill_(1e4)
    pipeline = make_pipeline(model, 2, autocast=torch.bfloat16, optimizer=None, graphs=FakeGraph)
    with pytest.raises(NotFiniteError, match="range of its grid"):
        run(pipeline, batches(2, dtype=torch.float32))


def test_what_is_not_finite_in_a_model_is_found_by_name() -> None:
    model = make_model()
    assert first_not_finite(model) is None
    model.get_buffer("layer2.0.bn1.running_var")[0] = float("inf")
    assert first_not_finite(model) == "layer2.0.bn1.running_var"
    model.get_parameter("layer1.0.conv1.weight").data[0] = float("nan")
    assert first_not_finite(model) == "layer1.0.conv1.weight"
    assert first_not_finite(model.to("meta")) is None


def test_what_is_deferred_is_judged_a_look_later_and_in_order() -> None:
    check = FiniteCheck(deferred=True)
    check.see(torch.tensor(1.0), "the first")
    check.see(torch.tensor(1.0), "the second")
    check.look()
    check.see(torch.tensor(float("inf")), "the second")
    check.see(torch.tensor(float("nan")), "the first")
    check.look()
    with pytest.raises(NotFiniteError, match="the first is nan"):
        check.look()


@pytest.mark.gpu
def test_on_a_gpu_nobody_waits_for_a_number() -> None:
    check = FiniteCheck()
    torch.cuda.set_sync_debug_mode("error")
    try:
        check.see(torch.full((), float("nan"), device="cuda"), "the first")
        check.look()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with pytest.raises(NotFiniteError, match="the first is nan"):
        check.settle()
