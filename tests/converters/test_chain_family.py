"""Any network with a chain of blocks through the converter, and networks that are refused by name."""

from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

from petra_zoo.checkpoints.load import create_any_model
from petra_zoo.converters import convert, save_converted
from petra_zoo.converters.families import family_for, family_of
from petra_zoo.converters.inverses import drift_of
from petra_zoo.converters.memory_report import check_saving
from petra_zoo.converters.reconstruction import measure_runs, measure_steps
from petra_zoo.errors import UserError
from petra_zoo.evaluation.export import export_model
from petra_zoo.hub.card import make_card
from petra_zoo.hub.checkpoint import read_checkpoint
from petra_zoo.models.classifier import as_unit_classifier
from petra_zoo.models.describe import describe_model
from petra_zoo.models.training_memory import StepBytes


class Adds(nn.Module):
    """x + size * f(x)."""

    def __init__(self, size: float) -> None:
        super().__init__()
        self.conv, self.size = nn.Conv2d(8, 8, 3, padding=1), size

    def forward(self, x: Tensor) -> Tensor:
        return x + self.size * self.conv(x).tanh()


class Grows(Adds):
    """x + size * f(x), where f has no bound."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.size * self.conv(x)


def foreign(size: float = 0.3, block: type[Adds] = Adds) -> nn.Module:
    """A network that timm has never seen."""
    torch.manual_seed(0)
    chain = nn.Sequential(*(block(size) for _ in range(5)))
    return nn.Sequential(nn.Conv2d(3, 8, 3), chain, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)).eval()


def images(n: int = 4, size: int = 32) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def convnext() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_convnext", num_classes=5, depths=(1, 1, 4, 1), ls_init_value=0.5).eval()


def test_timms_network_is_converted_saved_and_brought_back(convnext: nn.Module, tmp_path: Path) -> None:
    model = convert(convnext)
    assert model.pretrained_cfg["architecture"] == "petra_any"
    assert model._model_args["source"] == "test_convnext"
    assert any(run.g > 0.0 for run in measure_runs(model, images()))
    assert drift_of(convnext, model, images()) < 0.2
    save_converted(model, tmp_path / "out")
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    assert torch.equal(loaded(images()), model(images()))
    same = convert(convnext, coupling=0.0)
    assert torch.equal(same(images()), convnext(images()))
    back = family_of(same).plain(same)
    assert type(back) is type(convnext)
    assert torch.equal(back(images()), convnext(images()))


@pytest.mark.slow
def test_what_is_converted_can_be_described_exported_and_published(convnext: nn.Module, tmp_path: Path) -> None:
    save_converted(convert(convnext), tmp_path / "out")
    model = create_any_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    described = describe_model(as_unit_classifier(model), "petra_any")
    assert described.reversible_units >= 3
    done = export_model(str(tmp_path / "out"), tmp_path / "model.pt2", format="torch-export")
    assert done.path.is_file()
    card = make_card(read_checkpoint(tmp_path / "out"), "you/converted")
    assert "you/converted" in str(card)


def test_a_foreign_network_is_converted_and_trains_alike() -> None:
    network = foreign()
    model = convert(network, coupling=0.5, calibration=images()).double().train()
    for memory in ("reversible", "plain"):
        model.zero_grad()
        model.set_memory(memory)
        model(images().double()).square().sum().backward()
        gradients = [p.grad.clone() for p in model.parameters()]
        if memory == "reversible":
            first = gradients
    assert all(torch.allclose(x, y, rtol=1e-8, atol=1e-12) for x, y in zip(first, gradients, strict=True))


def test_a_foreign_network_cannot_be_saved_for_timm(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"make the source with timm\.create_model"):
        save_converted(convert(foreign(), calibration=images()), tmp_path / "out")


def test_branches_are_refused_where_blocks_have_none() -> None:
    with pytest.raises(UserError, match=r"Adds is not known by its branches \(.* are\): units='block' needs none"):
        convert(foreign(), units="branch", calibration=images())
    with pytest.raises(UserError, match="test_resnet: units=branch is for transformers"):
        convert(timm.create_model("test_resnet"), units="branch")


def test_what_each_block_adds_is_measured() -> None:
    small, large = (measure_steps(foreign(size), images())["1"] for size in (0.1, 1.0))
    assert len(small) == 5
    assert max(small) < min(large)


def test_a_network_that_would_become_another_one_is_refused_by_name() -> None:
    with pytest.raises(UserError, match="Sequential would become another network: what 1 gives moves too far"):
        convert(foreign(200.0, Grows), calibration=images())
    assert convert(foreign(200.0, Grows), coupling=0.5, calibration=images()).coupled_layers()[0].g() == 0.5


def test_a_conversion_that_saves_next_to_nothing_is_refused() -> None:
    memory = {"source": StepBytes(90, 2**20), "converted": StepBytes(80, 2**20 - 1000)}
    with pytest.raises(UserError, match=r"converting some_net does not pay: a training step peaks at 1\.00 MiB"):
        check_saving("some_net", memory)
    check_saving("some_net", {**memory, "converted": StepBytes(80, 2**19)})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("densenet121", "densenet121 cannot be converted, it is a DenseNet: use a network with 3 blocks of one shape"),
        ("vgg11", "vgg11 cannot be converted, it is a VGG: use .* such as resnet50"),
    ],
)
def test_networks_without_a_chain_are_refused_by_name(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        family_for(timm.create_model(name, device="meta"))
    assert "\n" not in str(caught.value)
