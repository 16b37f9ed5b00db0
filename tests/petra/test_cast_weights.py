"""Weights are cast once per update: as autocast casts them, to the bit."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from petra_zoo.petra import METHODS, Costs, Layout, Optimization, Pipeline, find_method
from petra_zoo.petra.cast_weights import CastWeights
from petra_zoo.reversible import Dispatches, FunctionUnit, Unit
from tests.petra.test_pipeline import batches, make_model, make_pipeline, run, sgd

OPTIONS: list[dict[str, Any]] = [{}, {"method": "backprop", "accumulation_steps": 2}]
MORE: list[dict[str, Any]] = [{"method": method} for method in METHODS if method != "petra"] + [
    {"last_stage": "recompute", "accumulation_steps": 2},
    {"weight_prediction": "head"},
]


def losses(pipeline: Pipeline, cast: bool) -> list[float]:
    if not cast:
        for stage in pipeline.stages:
            stage.casts = CastWeights(stage.units, None)
    data = batches(5, dtype=torch.float32)
    return [float(output.loss) for output in run(pipeline, data) if output.loss is not None]


@pytest.mark.parametrize("options", [*OPTIONS, *(pytest.param(x, marks=pytest.mark.slow) for x in MORE)], ids=str)
def test_losses_and_weights_are_those_of_autocasts_own_casts(options: dict[str, Any]) -> None:
    models = [make_model(torch.float32, drop_path_rate=0.2) for _ in range(2)]
    pipelines = [make_pipeline(model, 3, autocast=torch.bfloat16, **options) for model in models]
    ours, autocasts = (losses(pipeline, cast) for pipeline, cast in zip(pipelines, (True, False), strict=True))
    assert ours == autocasts
    for ours_, autocasts_ in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(ours_, autocasts_)


class Tied(nn.Module):
    """One linear layer in two units and once more as it is: its weight has three uses."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 5)

    def units(self) -> list[Unit]:
        first = FunctionUnit("first", lambda x: (torch.tanh(self.layer(x)),), {"layer": self.layer})
        return [
            first,
            FunctionUnit(
                "head", lambda x: (self.layer(x) + self.layer._parameters["weight"].sum(1),), {"layer": self.layer}
            ),
        ]

    def forward(self, x: Tensor) -> Tensor:
        for unit in self.units():
            (x,) = unit(x)
        return x


def tied() -> nn.Module:
    torch.manual_seed(0)
    return Tied()


@pytest.mark.parametrize("last_stage", ["graph", "recompute"])
def test_a_weight_of_two_units_gets_the_gradients_of_all_its_uses(last_stage: str) -> None:
    model, plain = tied(), tied()
    method = find_method("reversible").with_last_stage(last_stage)
    layout = Layout.of(model, [2], method=method, costs=Costs([1.0, 1.0], [1.0, 1.0]))
    pipeline = Pipeline(model, layout, method=method, optimization=Optimization(sgd(0.5)), autocast=torch.bfloat16)
    x, y = torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
    pipeline.step(x, y)
    with torch.autocast("cpu", torch.bfloat16):
        logits = plain(x)
    F.cross_entropy(logits.float(), y).backward()
    for ours, p in zip(model.parameters(), plain.parameters(), strict=True):
        assert p.grad is not None
        torch.testing.assert_close(ours, p - 0.5 * p.grad, rtol=1e-3, atol=1e-3)


class Float32Head(nn.Module):
    """Its head leaves autocast, and takes its input in its weights' type."""

    def __init__(self, head: Callable[[nn.Linear, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.fc, self.head = nn.Linear(5, 64), nn.Linear(64, 3), head

    def units(self) -> list[Unit]:
        return [
            FunctionUnit("stem", lambda x: (self.stem(x),), {"stem": self.stem}),
            FunctionUnit("head", lambda x: (self.head(self.fc, x),), {"fc": self.fc}),
        ]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.fc, self.stem(x))


def in_float32(fc: nn.Linear, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return fc(x.float())


def in_its_weights_type(fc: nn.Linear, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return fc(x.to(fc.weight.dtype))


def both_ways(fc: nn.Linear, x: Tensor) -> Tensor:
    return fc(x) + in_float32(fc, x)


@pytest.mark.parametrize("head", [in_float32, in_its_weights_type, both_ways])
def test_a_layer_that_leaves_autocast_keeps_its_weights(head: Callable[[nn.Linear, Tensor], Tensor]) -> None:
    model, plain = Float32Head(head), Float32Head(head)
    method = find_method("reversible")
    layout = Layout.of(model, [1, 1], method=method, costs=Costs([1.0, 1.0], [1.0, 1.0]))
    pipeline = Pipeline(model, layout, method=method, optimization=Optimization(sgd(0.5)), autocast=torch.bfloat16)
    x, y = torch.randn(4, 5), torch.tensor([0, 1, 2, 1])
    found = pipeline.step(x, y).logits
    with torch.autocast("cpu", torch.bfloat16):
        logits = plain(x)
    assert found is not None
    assert torch.equal(found, logits)
    F.cross_entropy(logits.float(), y).backward()
    for ours, p in zip(model.parameters(), plain.parameters(), strict=True):
        assert p.grad is not None
        torch.testing.assert_close(ours, p - 0.5 * p.grad, rtol=1e-3, atol=1e-3)


def test_a_compiled_branch_casts_its_weights_by_itself() -> None:
    model = make_model(torch.float32)
    casts = CastWeights(model.units(), torch.bfloat16)
    casts.refresh(0)
    conv = model.layer1[0].conv1
    with casts.standing_in(1):
        assert "forward" in vars(conv)
    model.compile_branches(backend="eager")
    with casts.standing_in(1):
        assert "forward" not in vars(conv)


def load(model: nn.Module) -> None:
    model.load_state_dict({name: 0.5 * x for name, x in model.state_dict().items()})


def write_into(model: nn.Module) -> None:
    with torch.no_grad():
        model.conv1.weight.mul_(0.5)


@pytest.mark.parametrize("change", [load, write_into])
def test_what_replaces_weights_is_seen_at_once(change: Callable[[nn.Module], None]) -> None:
    found = []
    for cast in (True, False):
        model = make_model(torch.float32)
        pipeline = make_pipeline(model, 1, method="backprop", autocast=torch.bfloat16, accumulation_steps=3)
        found.append(losses(pipeline, cast)[-1:])
        change(model)
        found[-1] += losses(pipeline, cast)
    assert found[0] == found[1]


def test_a_hook_on_the_gradient_of_a_weight_is_called() -> None:
    model = make_model(torch.float32)
    weight = model.layer1[0].conv1.weight
    weight.register_hook(torch.zeros_like)
    before = weight.detach().clone()
    run(make_pipeline(model, 2, autocast=torch.bfloat16), batches(3, dtype=torch.float32))
    assert torch.equal(weight, before)


def test_what_an_update_elsewhere_writes_through_data_is_seen_at_once() -> None:
    pipeline = make_pipeline(make_model(torch.float32), 1, method="backprop", autocast=torch.bfloat16, optimizer=None)
    ((images, labels),) = batches(1, dtype=torch.float32)
    pipeline.step(images, labels)
    pipeline.model.get_parameter("fc.weight").data.zero_()
    logits = pipeline.step(images, labels).logits
    assert logits is not None
    assert torch.equal(logits, logits[:1].expand_as(logits)), "the bias is all that is left"


def test_a_layer_that_computes_with_its_weight_keeps_it() -> None:
    class Standardised(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            assert self.weight.dtype == torch.float32
            return F.linear(x, self.weight - self.weight.mean())

    layer = Standardised(3, 3)
    casts = CastWeights([FunctionUnit("head", lambda x: (layer(x),), {"layer": layer})], torch.bfloat16)
    casts.refresh(0)
    with casts.standing_in(0):
        layer(torch.randn(2, 3))
    assert casts.stand_ins(0) == ([], [])


def test_weights_are_cast_once_per_update() -> None:
    pipeline = make_pipeline(
        make_model(torch.float32), 1, method="backprop", autocast=torch.bfloat16, accumulation_steps=2
    )
    counts = []
    for batch in batches(4, dtype=torch.float32):
        with Dispatches() as dispatches:
            pipeline.step(*batch)
        counts.append(dispatches.counts["aten._foreach_copy_.default"])
    # Beside the casts: where gradients begin a window, those in float32 and those in bfloat16; where they are added to
    # it, the latter.
    assert counts == [3, 1, 3, 1]
