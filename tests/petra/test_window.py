"""Gradients of a window are summed where they were in the window before."""

from typing import Any

import pytest
import torch

from tests.petra.test_pipeline import batches, make_model, make_pipeline


@pytest.mark.parametrize("k", [1, 2])
def test_gradients_stay_where_they_are_from_window_to_window(k: int) -> None:
    places: list[list[int]] = []
    pipeline = make_pipeline(make_model(), 2, accumulation_steps=k)
    stage = pipeline.stages[0]
    assert stage.optimizer is not None
    look: Any = lambda *_: places.append([p.grad.data_ptr() for p in stage.own_parameters()])  # noqa: E731
    stage.optimizer.register_step_pre_hook(look)
    for batch in batches(3 * k + 2):
        pipeline.step(*batch)
    assert len(places) == 3
    assert places[0] == places[1] == places[2]


def test_a_parameter_without_a_gradient_in_a_window_is_not_updated() -> None:
    model = make_model()
    pipeline = make_pipeline(model, 1, method="backprop")
    victim = next(p for p in pipeline.stages[0].own_parameters())
    (batch,) = batches(1)
    pipeline.step(*batch)
    before = victim.detach().clone()
    found = pipeline.stages[0]._vector_jacobian
    without: Any = lambda *args: (lambda x, y: (x, {k: v for k, v in y.items() if k != id(victim)}))(*found(*args))  # noqa: E731
    pipeline.stages[0]._vector_jacobian = without  # type: ignore[method-assign]
    pipeline.step(*batch)
    assert torch.equal(victim, before), "momentum would have moved it"
