"""Profiles of the units of a model."""

import importlib.metadata
import json
from pathlib import Path

import pytest
import timm
import torch

import petra_zoo  # noqa: F401 - registers the models
from petra_zoo.errors import UserError
from petra_zoo.models import PetraPaperRevNet
from petra_zoo.models.deferred import Deferred
from petra_zoo.petra import Profile, measure
from petra_zoo.reversible import LiveBytes


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return PetraPaperRevNet((3, 2), (8, 8), stem_type="cifar", num_classes=10)


@pytest.fixture(scope="module")
def profile(model: torch.nn.Module) -> Profile:
    return measure(model, 6, (3, 8, 8), repeats=1)


def test_every_unit_is_measured(model: torch.nn.Module, profile: Profile) -> None:
    assert [unit.name for unit in profile.units] == [unit.name for unit in model.units()]
    assert [unit.reversible for unit in profile.units] == [False, True, True, True, False, True, False]
    for unit in profile.units:
        assert min(unit.forward, unit.reverse, unit.graph_forward, unit.graph_backward) > 0
    assert profile.versions["torch"] == importlib.metadata.version("torch")
    assert (profile.batch_size, profile.input_size, profile.threads) == (6, (3, 8, 8), torch.get_num_threads())


def test_bytes_of_streams_parameters_and_graphs_are_exact(model: torch.nn.Module, profile: Profile) -> None:
    stream = 6 * 8 * 8 * 8 * 4
    assert profile.units[0].input_bytes == 6 * 3 * 8 * 8 * 4
    assert [unit.output_bytes for unit in profile.units[:4]] == [2 * stream] * 4
    assert profile.units[-1].output_bytes == 6 * 10 * 4
    assert sum(unit.parameter_bytes for unit in profile.units) == 4 * sum(p.numel() for p in model.parameters())
    images = torch.randn(6, 3, 8, 8)
    units = model.train().units()
    with LiveBytes([images]) as memory:
        streams = (images,)
        for unit in units:
            streams = unit(*streams)
        torch.empty(0)
    assert sum(unit.graph_bytes for unit in profile.units) == memory.now
    reverse = units[2].reverse
    outputs, gradients = (torch.randn(6, 8, 8, 8), torch.randn(6, 8, 8, 8)), (torch.randn(6, 8, 8, 8),) * 2
    with LiveBytes() as memory:
        reverse(outputs, gradients, list(units[2].parameters()))
    assert profile.units[2].working_bytes == memory.peak


def test_a_network_that_is_not_here_is_measured_unit_by_unit() -> None:
    torch.manual_seed(0)
    with Deferred.building(least=500) as deferred:
        model = PetraPaperRevNet((3, 2), (8, 8), stem_type="cifar", num_classes=10)
    missing = [name for name, x in model.named_parameters() if x.is_meta]
    assert missing
    found = measure(model, 6, (3, 8, 8), repeats=1, device=torch.device("cpu"))
    assert [name for name, x in model.named_parameters() if x.is_meta] == missing
    deferred.fill(model)
    whole = measure(model, 6, (3, 8, 8), repeats=1)

    def sizes(profile: Profile) -> list[tuple[int, ...]]:
        return [
            (u.parameter_bytes, u.input_bytes, u.output_bytes, u.graph_bytes, u.working_bytes) for u in profile.units
        ]

    assert sizes(found) == sizes(whole)
    assert all(unit.forward > 0 for unit in found.units)


@pytest.mark.parametrize("training", [True, False])
def test_measuring_changes_nothing(training: bool) -> None:
    model = timm.create_model("petra_revnet_tiny", drop_rate=0.1).train(training)
    model.layer1[0].eval()
    model.conv1.weight.grad = torch.ones_like(model.conv1.weight)
    calls: list[object] = []
    model.layer1.register_forward_hook(lambda *arguments: calls.append(arguments))
    before = {name: x.clone() for name, x in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    generator = torch.get_rng_state()
    measure(model, 4, (3, 16, 16), repeats=1)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert int(model.bn1.num_batches_tracked) == 0
    assert modes == [m.training for m in model.modules()]
    assert torch.equal(generator, torch.get_rng_state())
    assert torch.equal(model.conv1.weight.grad, torch.ones_like(model.conv1.weight))
    assert all(p.grad is None for p in model.parameters() if p is not model.conv1.weight)
    assert not calls


def test_costs_of_a_method(profile: Profile) -> None:
    unit = profile.units[1]
    assert profile.costs("petra")[1] == profile.costs("reversible")[1] == unit.forward + unit.reverse
    assert profile.costs("delayed")[1] == profile.costs("backprop")[1] == unit.graph_forward + unit.graph_backward
    assert profile.costs("dsp")[1] == unit.forward + unit.graph_forward + unit.graph_backward
    assert profile.costs("petra", last_stage=True) == profile.costs("backprop")
    with pytest.raises(ValueError, match="unknown method 'gpipe2'; expected petra or dsp"):
        profile.costs("gpipe2")


def test_a_saved_profile_is_read_back(profile: Profile, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    profile.save(path)
    assert Profile.load(path) == profile
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_not_a_profile_is_refused(profile: Profile, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    with pytest.raises(UserError, match=r"cannot read the profile .*: No such file"):
        Profile.load(path)
    path.write_text("{}")
    with pytest.raises(UserError, match="is not a profile: model: Field required"):
        Profile.load(path)
    content = json.loads(profile.to_json())
    content["units"][1]["forward"] = "fast"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"units.1.forward"):
        Profile.load(path)
    with pytest.raises(UserError, match="cannot write the profile"):
        profile.save(tmp_path / "missing" / "profile.json")
