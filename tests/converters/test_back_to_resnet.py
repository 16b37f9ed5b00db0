"""From a reversible network with coupling 0 back to the plain ResNet."""

import json
from pathlib import Path

import pytest
import timm
import torch
from timm.models.resnet import ResNet

from petra_zoo.converters import convert, save_converted, to_resnet
from petra_zoo.converters.families import family_of
from petra_zoo.errors import UserError
from tests.cli.test_main import petra_zoo
from tests.converters.networks import images, source

OTHERS = [
    pytest.param(name, marks=pytest.mark.slow) for name in ("resnet18", "seresnet18", "resnet26d", "ecaresnet26t")
]


@pytest.mark.parametrize("name", ["resnetblur18", "test_resnet", *OTHERS])
def test_the_way_there_and_back_gives_the_source(name: str, tmp_path: Path) -> None:
    network = source(name)
    save_converted(convert(network, coupling=0.0), tmp_path / "there")
    done = petra_zoo("convert", "--to-resnet", tmp_path / "there", "--output", tmp_path / "back", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["architecture"] == name
    back = timm.create_model(f"local-dir:{tmp_path / 'back'}", pretrained=True).eval()
    assert type(back) is ResNet
    assert back.pretrained_cfg["architecture"] == name
    expected = network.state_dict()
    assert {key: bool(torch.equal(x, expected[key])) for key, x in back.state_dict().items()} == dict.fromkeys(
        expected, True
    )
    assert torch.equal(back(images()), network(images()))


def test_a_resnet_with_other_widths_keeps_them() -> None:
    model = timm.create_model(
        "petra_revnet50", num_classes=5, coupling=0.0, layers=(2, 1, 2, 1), channels=(8, 16, 16, 32)
    )
    back = to_resnet(model.eval())
    assert type(back) is ResNet
    assert torch.equal(back(images()), model(images()))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: convert(source("resnet18"), coupling=[0.0, 0.5, 0.0, 0.0]), "layer2 has g = 0.5, and only g = 0 is"),
        (lambda: timm.create_model("petra_revnet18", coupling=0.0, exact=True), "rounds its branches"),
        (lambda: timm.create_model("petra_revnet_tiny", coupling=0.0), "no plain ResNet like petra_revnet_tiny"),
        (lambda: timm.create_model("petra_revnet18_paper_cifar"), "it is a PetraPaperRevNet"),
        (lambda: source("resnet18"), "it is a ResNet"),
    ],
)
def test_where_it_is_not_exact_the_reason_is_given(make: object, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        to_resnet(make())
    assert "\n" not in str(caught.value)


def test_a_refusal_leaves_nothing_behind(tmp_path: Path) -> None:
    save_converted(convert(source("resnet18"), coupling=0.5), tmp_path / "there")
    done = petra_zoo("convert", tmp_path / "there", "--to-resnet", "--output", tmp_path / "back")
    assert done.returncode == 2
    assert "layer1 has g = 0.5" in done.stderr
    assert done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_a_networks_own_gains_stay() -> None:
    """Those of its standardised convolutions, which are called as the buffer beside a coupling is."""
    network = timm.create_model("nfnet_l0", num_classes=5).eval()
    model = convert(network, coupling=0.0)
    back = family_of(model).plain(model)
    assert all(torch.equal(x, back.state_dict()[name]) for name, x in network.state_dict().items())
