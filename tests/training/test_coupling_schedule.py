"""Moving couplings to 1 during fine-tuning."""

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d
from timm.models.resnet import ResNet
from timm.utils import ModelEmaV3

from petra_zoo.converters import convert
from petra_zoo.errors import UserError
from petra_zoo.models import PetraRevNet
from petra_zoo.petra import Layout, Optimization, Pipeline
from petra_zoo.training.coupling_schedule import CouplingSchedule, move_coupling
from petra_zoo.training.finetuning import keep_statistics
from tests.converters.networks import images, source


def small(name: str = "resnet18", **kwargs: object) -> ResNet:
    """A ResNet of 11 narrow blocks with norms as after training."""
    return source(
        name, **{"layers": (3, 3, 3, 2), "channels": (8, 8, 8, 16), "stem_type": "deep", "stem_width": 4} | kwargs
    )


def couplings(model: PetraRevNet) -> list[float]:
    return [layer.g() for layer in model.coupled_layers()]


def test_couplings_reach_1_linearly_in_multiples_of_1_256() -> None:
    model = convert(small(), coupling=[1 / 16, 1 / 2, 1.0, 0.0])
    schedule = CouplingSchedule(model, 4)
    seen, moved = [], []
    for epoch in range(6):
        moved.append(schedule.moves(epoch))
        schedule.apply(epoch, model)
        seen.append(couplings(model))
    assert [g[0] for g in seen] == [1 / 16, 76 / 256, 136 / 256, 196 / 256, 1.0, 1.0]
    assert [g[1] for g in seen] == [1 / 2, 5 / 8, 3 / 4, 7 / 8, 1.0, 1.0]
    assert {g[2] for g in seen} == {1.0}
    assert [g[3] for g in seen][:2] == [1 / 256, 1 / 4]  # above 0 from the start: the pipeline's layout is fixed
    assert moved == [True, True, True, True, True, False]


def test_a_schedule_that_was_made_shorter_brings_couplings_to_1_at_once() -> None:
    model = convert(small(), coupling=1 / 4)
    schedule = CouplingSchedule(model, 1)
    for layer in model.coupled_layers():
        move_coupling(layer, 0.5)  # as a longer one had left them
    assert schedule.moves(2)
    schedule.apply(2, model)
    assert couplings(model) == [1.0] * 4
    assert not schedule.moves(3)


@pytest.mark.parametrize("name", ["resnet18", "seresnet18", "ecaresnet26t"])
def test_a_moved_coupling_is_what_a_conversion_to_it_gives(name: str) -> None:
    network = small(name)
    model, expected = convert(network, coupling=0.25), convert(network, coupling=0.75)
    for layer in model.coupled_layers():
        move_coupling(layer, 0.5)
        move_coupling(layer, 0.75)
    for (key, found), value in zip(model.state_dict().items(), expected.state_dict().values(), strict=True):
        assert torch.allclose(found, value, rtol=1e-6), key


def test_a_moving_average_has_the_models_coupling_and_scale() -> None:
    model = convert(small(), coupling=1 / 4)
    schedule, ema = CouplingSchedule(model, 2), ModelEmaV3(model, decay=0.9)
    for epoch in range(3):
        schedule.apply(epoch, model, ema.module)
        for _ in range(3):
            ema.update(model)
        assert couplings(ema.module) == couplings(model)  # reading checks that they are multiples of 1/256
    for (key, found), value in zip(ema.module.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.allclose(found, value, rtol=1e-5), key  # the weights themselves never changed


def test_couplings_move_where_batch_norms_are_frozen() -> None:
    model = convert(small(), coupling=[1 / 16, 1 / 2, 1.0, 0.0])
    expected = convert(small(), coupling=[1 / 16, 1 / 2, 1.0, 0.0])
    keep_statistics(model)
    for one in (model, expected):
        schedule = CouplingSchedule(one, 2)
        for epoch in range(3):
            schedule.apply(epoch, one)
    assert couplings(model) == [1.0] * 4
    for (key, found), value in zip(model.state_dict().items(), expected.state_dict().values(), strict=True):
        assert torch.equal(found, value), key


def test_a_norm_with_an_activation_inside_is_not_scaled() -> None:
    layer = convert(small(), coupling=0.5).layer1
    layer[0].bn2 = BatchNormAct2d(8, act_layer=torch.nn.SiLU)
    with pytest.raises(UserError, match="a branch that ends in BatchNormAct2d cannot be scaled"):
        move_coupling(layer, 0.75)


@pytest.mark.parametrize("stages", [1, 3])
def test_a_pipeline_trains_through_a_move(stages: int) -> None:
    torch.manual_seed(0)
    model = convert(small(), purpose="petra").train()
    schedule = CouplingSchedule(model, 2)
    schedule.apply(0, model)
    optimization = Optimization(lambda named: torch.optim.SGD([p for _, p in named], 0.01))
    pipeline = Pipeline(model, Layout.of(model, stages, input_size=(3, 32, 32)), optimization=optimization)
    for epoch in range(3):
        if schedule.moves(epoch):
            assert pipeline.in_flight == 0
            schedule.apply(epoch, model)
        for step in range(4):
            pipeline.step(images(8, 32, seed=step), torch.arange(8) % 5)
        outputs = pipeline.drain()
        assert len(outputs) == stages - 1
        assert all(p.isfinite().all() for p in model.parameters())
    assert couplings(model) == [1.0] * 4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: small(), "a ResNet has no coupling to move"),
        (lambda: convert(small(), coupling=0.0), "layer1 has 3 reversible blocks and coupling 0; .*--for petra"),
        (lambda: timm.create_model("petra_revnet_tiny", coupling=0.5), "built with coupling=0.5"),
    ],
)
def test_what_cannot_be_moved_is_refused(make: object, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        CouplingSchedule(make(), 3)
    assert "\n" not in str(caught.value)
