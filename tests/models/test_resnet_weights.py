"""timm's ResNet weights in the reversible ResNets: tags, coupling while they load, adaptation, saving."""

from functools import cache
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save
from timm.data import resolve_model_data_config
from timm.models import get_arch_pretrained_cfgs, get_pretrained_cfg, save_for_hf
from timm.models.resnet import ResNet
from torch import Tensor

import petra_zoo  # noqa: F401  (importing it registers our models)
from petra_zoo.converters.calibration import noise
from petra_zoo.converters.reconstruction import measure_runs
from petra_zoo.models import PetraRevNet
from petra_zoo.models.resnet_weights import run_anchors, run_coupling
from tests.converters.networks import source
from tests.loopback_hub import LoopbackHub
from tests.models.networks import images, tiny
from tests.models.test_petra_revnet import assert_same_function

LAYERS = (4, 7, 2, 2)  # runs of 4, 6, 1 and 1 blocks


def plain_weights() -> dict[str, Tensor]:
    """Those of a plain ResNet with the blocks of the tiny network."""
    model = tiny(layers=LAYERS, in_chans=3)
    return {name: value for name, value in model.state_dict().items() if not name.endswith("coupling")}


def loaded(weights: dict[str, Tensor], **kwargs: object) -> PetraRevNet:
    overlay = {"state_dict": weights}
    return timm.create_model(
        "petra_revnet_tiny", pretrained=True, pretrained_cfg_overlay=overlay, layers=LAYERS, **kwargs
    ).eval()


@cache
def resnet(depth: int) -> ResNet:
    return source(f"resnet{depth}", num_classes=1000)


def serve(hub: LoopbackHub, depth: int) -> None:
    """Puts a ResNet's weights where timm's are."""
    cfg = get_pretrained_cfg(f"resnet{depth}")
    weights = {name: value.contiguous() for name, value in resnet(depth).state_dict().items()}
    hub.add(cfg.hf_hub_id, {"model.safetensors": save(weights)})


@pytest.mark.parametrize("depth", [18, 34, 50, 101, 152])
def test_every_tag_of_the_resnet_is_a_tag_of_the_reversible_one(depth: int) -> None:
    theirs, ours = (get_arch_pretrained_cfgs(f"{name}{depth}") for name in ("resnet", "petra_revnet"))
    assert [key.replace("petra_revnet", "resnet") for key in ours] == list(theirs)
    assert get_pretrained_cfg(f"petra_revnet{depth}").tag == get_pretrained_cfg(f"resnet{depth}").tag
    for mine, other in zip(ours.values(), theirs.values(), strict=True):
        same = {"url": None, "architecture": None}
        assert {**mine.to_dict(), **same} == {**other.to_dict(), **same}
    assert set(ours) <= set(timm.list_models("petra_*", pretrained=True))


def test_the_weights_come_from_timms_repository_and_keep_its_preprocessing(
    hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(hub, 34)
    model = timm.create_model("petra_revnet34.a1_in1k", pretrained=True).eval()
    assert hub.paths("GET") == ["/timm/resnet34.a1_in1k/resolve/main/model.safetensors"]
    assert resolve_model_data_config(model) == resolve_model_data_config(timm.create_model("resnet34.a1_in1k"))
    assert [layer.g() for layer in model.coupled_layers()] == [0.125, 0.125, 0.125, 0.0]
    assert [layer.anchor_every for layer in model.coupled_layers()] == [0, 0, 4, 0]
    with torch.no_grad():
        found, expected = model(images(4, 32)), resnet(34)(images(4, 32))
    assert 0 < float((found - expected).norm()) < 0.2 * float(expected.norm())
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    again = timm.create_model("petra_revnet34", pretrained=True).eval()
    assert torch.equal(again(images(4, 32)), found)
    assert len(hub.paths("GET")) == 1


def test_coupling_0_gives_the_resnets_function_to_the_bit(hub: LoopbackHub) -> None:
    serve(hub, 18)
    model = timm.create_model("petra_revnet18", pretrained=True, coupling=0.0)
    assert_same_function(resnet(18), model, 32)


def test_branches_inside_runs_are_scaled_and_no_others() -> None:
    weights = plain_weights()
    model = loaded(weights)
    assert [layer.g() for layer in model.coupled_layers()] == [0.125, 0.125, 0.0, 0.0]
    assert [layer.anchor_every for layer in model.coupled_layers()] == [0, 4, 0, 0]
    scaled = {name for name, value in model.state_dict().items() if not torch.equal(value, weights.get(name, value))}
    runs = {"layer1": range(0, 4), "layer2": range(1, 7)}
    expected = {f"{layer}.{i}.bn2.{kind}" for layer, run in runs.items() for i in run for kind in ("weight", "bias")}
    assert scaled == expected
    assert all(torch.equal(model.state_dict()[name], weights[name] * 1.125) for name in scaled)


def test_a_coupling_of_ones_own_is_taken_and_anchored() -> None:
    model = loaded(plain_weights(), coupling=[0.0, 0.0625, 0.25, 1.0])
    assert [layer.g() for layer in model.coupled_layers()] == [0.0, 0.0625, 0.25, 1.0]
    assert [layer.anchor_every for layer in model.coupled_layers()] == [0, 3, 0, 0]
    assert [layer.anchor_every for layer in loaded(plain_weights(), anchor_every=2).coupled_layers()] == [2] * 4
    assert [layer.anchor_every for layer in loaded(plain_weights(), anchor_every=0).coupled_layers()] == [0] * 4


def test_other_heads_inputs_and_poolings_work() -> None:
    weights = plain_weights()
    model = loaded(weights, num_classes=7, in_chans=1, global_pool="max")
    assert model(images(channels=1)).shape == (4, 7)
    assert torch.allclose(model.conv1.weight, weights["conv1.weight"].sum(1, keepdim=True))
    assert torch.equal(model.layer2[1].bn2.weight, weights["layer2.1.bn2.weight"] * 1.125)
    assert loaded(weights, num_classes=0)(images()).shape == (4, 48)


def test_features_only_gives_the_models_own_features() -> None:
    features = loaded(plain_weights(), features_only=True, out_indices=(2, 4))
    expected = loaded(plain_weights()).forward_intermediates(images(), indices=(2, 4), intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(features(images()), expected, strict=True))


def test_weights_with_couplings_load_as_they_are(tmp_path: Path) -> None:
    model = loaded(plain_weights())
    save_for_hf(model, str(tmp_path / "saved"), safe_serialization=True)
    for again in (
        timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True).eval(),
        loaded(model.state_dict()),
    ):
        assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
        assert torch.equal(again(images()), model(images()))
    rebuilt = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True)
    assert [layer.anchor_every for layer in rebuilt.coupled_layers()] == [0, 4, 0, 0]


def test_weights_that_are_handed_in_stay_as_they_are() -> None:
    weights = plain_weights()
    before = {name: value.clone() for name, value in weights.items()}
    loaded(weights)
    assert weights.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in weights.items())


def test_a_key_that_is_missing_is_named() -> None:
    weights = plain_weights()
    del weights["layer2.1.bn2.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*layer2\.1\.bn2\.weight"):
        loaded(weights)


def reconstruction_errors(depth: int, **kwargs: object) -> list[float]:
    overlay = {"state_dict": source(f"resnet{depth}", num_classes=1000).state_dict()}
    model = timm.create_model(f"petra_revnet{depth}", pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)
    return [run.error for run in measure_runs(model, noise(model))]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("depth", [34, 50, 101, 152])
def test_every_run_can_be_inverted(depth: int) -> None:
    assert 0 < max(reconstruction_errors(depth)) <= 1e-4


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("coupling", [1 / 256, 1 / 64, 1 / 16, 1 / 4, 1 / 2, 1.0])
def test_every_run_can_be_inverted_at_a_coupling_of_ones_own(coupling: float) -> None:
    # The last bits are the processor's: 1.11e-4 was seen at 1/4. The default coupling has its bound above.
    assert max(reconstruction_errors(101, coupling=coupling)) <= 2e-4


def test_the_table_of_couplings_and_anchors() -> None:
    assert [run_coupling(blocks) for blocks in (0, 1, 2, 3, 5, 35)] == [0.0, 0.0, 0.0, 0.125, 0.125, 0.125]
    assert [run_anchors(22, g) for g in (0.0, 1 / 256, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)] == [0, 1, 3, 4, 5, 6, 6]
    assert run_anchors(4, 1 / 8) == 0
