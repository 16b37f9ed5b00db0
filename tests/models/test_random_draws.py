"""Which units may draw random numbers: none that does is missed."""

import inspect
import re
from types import MethodType

import pytest
import timm
import timm.layers
import torch
import torch.nn.functional as F
from torch import nn

import petra_zoo  # noqa: F401 - registers the models
from petra_zoo.models import PetraRevNet
from petra_zoo.reversible import CoupledUnit, FunctionUnit, Unit, may_draw
from tests.models.networks import images, small, tiny

DRAWS = re.compile(r"dropout\(|dropout_p|drop_path\(|drop_block|torch\.rand|bernoulli|uniform_|rrelu|_VF\.|_random_")
RATES = {"drop_rate": 0.5, "drop_path_rate": 0.5, "drop_block_rate": 0.3}


def drawn(units: list[Unit], x: torch.Tensor) -> dict[str, bool]:
    """Whether each unit moved the generator."""
    found = {}
    streams: tuple[torch.Tensor, ...] = (x,)
    for unit in units:
        before = torch.get_rng_state()
        streams = unit(*streams)
        found[unit.name] = not torch.equal(before, torch.get_rng_state())
    return found


MODELS = {
    **{f"rates {rate}": lambda rate=rate, value=value: tiny(**{rate: value}) for rate, value in RATES.items()},
    "all rates": lambda: tiny(**RATES),
    "none": tiny,
    "bottlenecks": lambda: timm.create_model("petra_revnet50_cifar", num_classes=10, **RATES),
    "stochastic activation": lambda: small(act_layer=nn.RReLU),
    "paper": lambda: timm.create_model("petra_revnet18_paper_cifar", num_classes=10, drop_rate=0.5),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_unit_that_draws_is_known_to(name: str) -> None:
    model = MODELS[name]().train()
    units = model.units()
    found = drawn(units, images(2, 32))
    assert all(unit.draws for unit in units if found[unit.name])
    assert any(found.values()) == (name != "none")


def test_units_without_dropout_are_known_not_to_draw() -> None:
    for model in (tiny(), timm.create_model("petra_revnet18_paper_cifar")):
        units = model.units()
        assert {unit.name for unit in units if unit.draws} <= {"head"}  # whose rate may be set later


class Own(nn.Conv2d):
    pass


@pytest.mark.parametrize("change", ["own class", "hook", "own forward", "own branch", "own layer"])
def test_what_is_not_known_may_draw(change: str) -> None:
    model: PetraRevNet = tiny()
    block = model.layer1[1]
    if change == "own class":
        block.conv1 = Own(16, 16, 3, padding=1)
    elif change == "hook":
        block.conv1.register_forward_hook(lambda module, args, out: F.dropout(out))
    elif change == "own forward":
        block.conv1.forward = lambda x: F.dropout(x)
    elif change == "own branch":
        block.branch = MethodType(lambda self, h: F.dropout(h), block)
    else:
        model.layer1[1] = nn.Sequential(nn.Conv2d(16, 16, 1), Own(16, 16, 1))
    by_name = {unit.name: unit.draws for unit in model.units()}
    assert by_name["layer1.1"]
    assert not by_name["layer3.1"]


def test_functions_of_ones_own_may_draw() -> None:
    conv = nn.Conv2d(4, 4, 1)
    assert FunctionUnit("a", lambda x: (F.dropout(conv(x)),), {"conv": conv}).draws
    assert CoupledUnit("b", conv, branch=conv, activate=lambda x: F.dropout(x), coupling=lambda: 1.0).draws
    assert not CoupledUnit("c", conv, branch=conv, activate=F.relu, coupling=lambda: 1.0).draws
    assert CoupledUnit("d", conv, branch=conv, activate=F.rrelu, coupling=lambda: 1.0).draws


def classes() -> list[type[nn.Module]]:
    """Layers of torch and timm."""
    found = [kind for namespace in (nn, timm.layers) for kind in vars(namespace).values()]
    return [kind for kind in found if inspect.isclass(kind) and issubclass(kind, nn.Module)]


def test_no_layer_of_torch_or_timm_whose_forward_draws_is_missed() -> None:
    from petra_zoo.reversible.random_draws import _class_may_draw

    for kind in classes():
        if DRAWS.search(inspect.getsource(kind.forward)) and not _class_may_draw(kind):
            has_dropout_inside = "nn.Dropout" in inspect.getsource(kind)  # a sub-module that is known to draw
            assert has_dropout_inside, kind


def test_plain_layers_are_known_not_to_draw() -> None:
    for module in (nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1), nn.ReLU(), timm.layers.SEModule(16), nn.LayerNorm(2)):
        assert not may_draw(module)
        assert not may_draw(module.forward)
