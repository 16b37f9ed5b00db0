"""Networks from elsewhere: torchvision's weights, through its own loader, from a file where it keeps downloads."""

import json
import urllib.error
from pathlib import Path

import pytest
import timm
import torch
import torchvision

from petra_zoo.converters import convert, load_source, save_converted
from petra_zoo.errors import UserError
from tests.converters.networks import images
from tests.models.networks import with_trained_statistics


@pytest.fixture
def downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """torch.hub's folder, and no network."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))

    def offline(*_: object, **__: object) -> None:
        raise urllib.error.URLError("no network in this test")

    monkeypatch.setattr("torch.hub.urlopen", offline)
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def downloaded(folder: Path, tag: str = "IMAGENET1K_V1", name: str = "resnet18") -> torch.nn.Module:
    """A torchvision network whose weights stand in for the downloaded ones."""
    torch.manual_seed(0)
    network = with_trained_statistics(torchvision.models.get_model(name, weights=None)).eval()
    weights = torchvision.models.get_model_weights(name)[tag]
    torch.save(network.state_dict(), folder / weights.url.rsplit("/", 1)[1])
    return network


def test_a_torchvision_weight_is_converted_with_its_preprocessing_and_licence(downloads: Path, tmp_path: Path) -> None:
    network = downloaded(downloads)
    model = convert("torchvision:resnet18.IMAGENET1K_V1", coupling=0.0)
    assert torch.equal(model(images()), network(images()))
    save_converted(model, tmp_path / "out")
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    assert torch.equal(loaded(images()), network(images()))
    assert timm.data.resolve_model_data_config(loaded) == {
        "input_size": (3, 224, 224),
        "interpolation": "bilinear",
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "crop_pct": 224 / 256,
        "crop_mode": "center",
    }
    config = json.loads((tmp_path / "out" / "config.json").read_text())["pretrained_cfg"]
    assert config["license"] == "bsd-3-clause"
    assert config["origin_url"].startswith("https://github.com/pytorch/vision")
    assert config["tag"] == "IMAGENET1K_V1"


def test_torchvisions_default_weight_keeps_its_own_crop(downloads: Path) -> None:
    network = downloaded(downloads, "IMAGENET1K_V2", "resnet50")
    model = load_source("torchvision:resnet50")
    assert torch.equal(model(images(2)), network(images(2)))
    assert model.pretrained_cfg["crop_pct"] == 224 / 232


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("torchvision:resnet51.IMAGENET1K_V1", "no network 'resnet51' in common; nearest: resnet50"),
        ("torchvision:resnet50.V3", "resnet50 has the weights IMAGENET1K_V1, IMAGENET1K_V2, not 'V3'"),
        ("torchvision:densenet121", "densenet121 cannot be converted, it is a DenseNet: use"),
        ("torchvision:resnet18", "cannot load torchvision:resnet18 from https://.*no network"),
    ],
)
def test_a_torchvision_weight_that_cannot_be_had_is_one_line(source: str, message: str, downloads: Path) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_source(source)
    assert "\n" not in str(caught.value)
    assert not list(downloads.iterdir())


def test_a_damaged_download_is_one_line(downloads: Path) -> None:
    downloaded(downloads)
    (file,) = downloads.iterdir()
    file.write_bytes(file.read_bytes()[:-5000])
    with pytest.raises(UserError, match="cannot load torchvision:resnet18") as caught:
        load_source("torchvision:resnet18")
    assert "\n" not in str(caught.value)
