"""What a container of coupled blocks keeps beside its weights: the gain, which is no part of a ResNet's state."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from petra_zoo.errors import UserError
from petra_zoo.models.reversible_sequential import ReversibleSequential
from petra_zoo.models.run_buffers import RunBuffers
from petra_zoo.petra import Pipeline
from tests.models.networks import small, tiny


def container(coupling: float | None = None, gain: float | None = None, *, has_gain: bool = True) -> RunBuffers:
    blocks = [nn.Linear(3, 3) for _ in range(3)]
    return RunBuffers(blocks, coupling, 0.0, "auto", gain=gain, has_gain=has_gain)


def test_a_gain_is_saved_and_loaded() -> None:
    source, target = container(0.5, 1.5), container()
    target.load_state_dict(source.state_dict())
    assert (target.g(), target.gain_now()) == (0.5, 1.5)


def test_a_state_dict_without_a_gain_has_1() -> None:
    state = container(0.5, 1.5).state_dict()
    del state["gain"]
    target = container()
    target.set_gain(1.25)
    target.load_state_dict(state)
    assert target.gain_now() == 1.0


def test_a_plain_networks_state_has_no_gain() -> None:
    target = container()
    target.set_gain(1.25)
    target.load_state_dict(nn.Sequential(*(nn.Linear(3, 3) for _ in range(3))).state_dict())
    assert (target.g(), target.gain_now(), float(target.gain)) == (0.0, 1.0, 1.0)


def test_a_gain_that_contradicts_a_checkpoint_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"gain is 1\.5 in the checkpoint, but .* gain=1\.25: leave gain out"):
        container(None, 1.25).load_state_dict(container(0.5, 1.5).state_dict())


def test_the_average_of_two_gains_is_one() -> None:
    state = container(0.5, 1.5).state_dict()
    state["gain"] = torch.tensor(1.5001)
    target = container()
    target.load_state_dict(state)
    assert target.gain_now() == 1.5
    assert float(target.gain) == 1.5


def test_at_coupling_0_there_is_no_gain() -> None:
    layer = container(0.0, 1.5)
    assert layer.gain_now() == 1.0
    layer.set_coupling(0.5)
    assert layer.gain_now() == 1.5


@pytest.mark.parametrize("value", [0.0, -1.0, 5.0, 1.001, float("nan")])
def test_a_gain_that_is_none_is_refused(value: float) -> None:
    with pytest.raises(UserError, match=r"a gain is a multiple of 1/256 above 0"):
        container().set_gain(value)


def test_a_container_without_a_gain_refuses_one() -> None:
    with pytest.raises(UserError, match="keep no gain"):
        container(has_gain=False).set_gain(1.5)


def test_a_moved_or_copied_container_keeps_its_gain() -> None:
    layer = container(0.5, 1.5)
    moved = copy.deepcopy(layer).to("meta")
    assert (moved.gain_now(), copy.deepcopy(layer).to(torch.bfloat16).gain_now()) == (1.5, 1.5)


def test_a_resnet_saves_no_gain() -> None:
    model = small()
    assert not [name for name in model.state_dict() if name.endswith("gain")]
    assert model.layer2.gain_now() == 1.0


def anchors(g: float, autocast: bool, **kwargs: Any) -> list[int]:
    blocks = [nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4)) for _ in range(12)]
    network = ReversibleSequential(blocks, coupling=g, **kwargs)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        units, _ = network.units("blocks")
    return [i for i, unit in enumerate(units) if unit.anchor]


def test_below_1_streams_are_kept_every_few_blocks_where_branches_compute_in_16_bits() -> None:
    spacing = {bits: anchors(2.0**-bits, autocast=True)[0] for bits in (1, 2, 3, 5)}
    assert spacing == {1: 8, 2: 6, 3: 4, 5: 2}


def test_below_1_they_are_kept_where_the_error_of_a_longer_row_would_count() -> None:
    spacing = {bits: anchors(2.0**-bits, autocast=False)[0] for bits in (2, 3, 5, 8)}
    assert spacing == {2: 6, 3: 4, 5: 2, 8: 1}
    assert anchors(0.5, autocast=False) == [8]
    assert anchors(0.25, autocast=False, anchor_every=5) == [5, 10]
    assert set(anchors(0.5, autocast=False, streams="bfloat16")) == set(range(1, 12))


def test_a_float64_network_is_inverted_further() -> None:
    blocks = [nn.Linear(4, 4).double() for _ in range(24)]
    units, _ = ReversibleSequential(blocks, coupling=0.25).units("blocks")
    assert [i for i, unit in enumerate(units) if unit.anchor] == [18]


@pytest.mark.parametrize(
    ("g", "autocast", "kwargs"),
    [
        (1.0, True, {}),
        (0.0, True, {}),
        (0.25, False, {"exact": True}),
        (0.25, True, {"exact": True}),
        (0.25, True, {"streams": "fixed16"}),
    ],
)
def test_elsewhere_they_are_kept_as_often_as_is_asked_for(g: float, autocast: bool, kwargs: dict[str, Any]) -> None:
    assert anchors(g, autocast, **kwargs) == []
    assert anchors(g, autocast, anchor_every=5, **kwargs) == [5, 10]


def test_a_pipeline_keeps_them_as_its_autocast_asks() -> None:
    model = tiny(coupling=1 / 64).double().train()  # which inverts further than 16 bits do
    kept = []
    for autocast in (None, torch.bfloat16):
        pipeline = Pipeline(model, [len(model.units())], method="reversible", autocast=autocast)
        kept.append([unit.name for unit in pipeline.stages[0].units if unit.anchor])
    assert kept == [[], ["layer1.2"]]
