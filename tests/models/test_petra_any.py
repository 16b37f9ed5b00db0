"""Any network of timm's by name, with reversible chains."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf
from torch import nn

import petra_zoo  # noqa: F401 - registers the models
from petra_zoo.errors import UserError
from petra_zoo.models.make_reversible import ReversibleChains

SMALL = {"source": "mixer_s32_224", "img_size": 64, "num_classes": 5}


def small(**kwargs: object) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("petra_any", **{**SMALL, **kwargs})
    nn.init.normal_(model.head.weight)
    return model.eval()


def test_it_is_timms_network_with_reversible_chains() -> None:
    model = small()
    assert isinstance(model, ReversibleChains)
    assert model.blocks.g() == 1.0
    assert model.pretrained_cfg["architecture"] == "petra_any"
    assert model.pretrained_cfg["mean"] == timm.get_pretrained_cfg("mixer_s32_224").mean


def test_a_saved_one_is_loaded_as_it_was(tmp_path: Path) -> None:
    model, x = small(units="block"), torch.randn(1, 3, 64, 64)
    model.set_coupling(0.25)
    model.set_gain(1.25)
    model.set_anchors(4)
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(loaded(x), model(x))
    assert (loaded.blocks.g(), loaded.blocks.gain_now(), loaded.blocks.anchor_every) == (0.25, 1.25, 4)


def test_weights_of_the_plain_network_give_its_function() -> None:
    plain = timm.create_model("mixer_s32_224", img_size=64, num_classes=5).eval()
    model, x = small(), torch.randn(1, 3, 64, 64)
    model.load_state_dict(plain.state_dict())
    assert torch.equal(model(x), plain(x))


def test_a_source_that_timm_does_not_know_is_refused() -> None:
    with pytest.raises(UserError, match=r"such as 'convnext_atto', not 'no_such'"):
        timm.create_model("petra_any", source="no_such")


def test_a_source_without_chains_is_refused_with_the_reason() -> None:
    with pytest.raises(UserError, match="VGG has no 3 blocks one after the other"):
        timm.create_model("petra_any", source="vgg11")


def test_weights_that_an_overlay_names_are_taken(tmp_path: Path) -> None:
    plain = timm.create_model("test_convnext", num_classes=5).eval()
    save_file(plain.state_dict(), tmp_path / "own.safetensors")
    overlay = {"file": str(tmp_path / "own.safetensors"), "num_classes": 5}
    arguments = {"source": "test_convnext", "num_classes": 5, "pretrained": True}
    model = timm.create_model("petra_any", pretrained_cfg_overlay=overlay, **arguments).eval()
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(model(images), plain(images))


def test_features_are_of_all_levels_that_there_are() -> None:
    found = timm.create_model("petra_any", source="test_convnext", features_only=True)(torch.randn(1, 3, 64, 64))
    expected = timm.create_model("test_convnext", features_only=True)(torch.randn(1, 3, 64, 64))
    assert [x.shape for x in found] == [x.shape for x in expected]
