"""Files of weights as they are found: under any name, from any framework, old ones too."""

import argparse
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from petra_zoo.converters import load_source
from petra_zoo.data.labels import names_of
from petra_zoo.errors import UserError
from tests.converters.networks import images, source

ARCHITECTURE = "test_resnet"


@pytest.fixture(scope="module")
def network() -> Any:
    return source(ARCHITECTURE)


def assert_loads(path: Path, network: Any) -> None:
    loaded = load_source(str(path), ARCHITECTURE)
    assert torch.equal(loaded(images()), network(images()))


@pytest.mark.parametrize("name", ["best.pth.tar", "last.ckpt", "WEIGHTS.PTH", "weights", "step.1000"])
def test_a_checkpoint_may_have_any_name(name: str, network: Any, tmp_path: Path) -> None:
    torch.save({"state_dict": network.state_dict()}, tmp_path / name)
    assert_loads(tmp_path / name, network)


@pytest.mark.parametrize("name", ["WEIGHTS.SAFETENSORS", "weights.bin"])
def test_safetensors_are_known_by_their_content(name: str, network: Any, tmp_path: Path) -> None:
    save_file(network.state_dict(), tmp_path / name)
    assert_loads(tmp_path / name, network)


def test_a_checkpoint_from_before_batch_norms_counted_is_loaded(network: Any, tmp_path: Path) -> None:
    old = {key: x for key, x in network.state_dict().items() if not key.endswith(".num_batches_tracked")}
    torch.save(old, tmp_path / "old.pth")
    assert_loads(tmp_path / "old.pth", network)


def test_a_training_checkpoint_of_timm_is_loaded(network: Any, tmp_path: Path) -> None:
    state = {"epoch": 9, "arch": ARCHITECTURE, "state_dict": network.state_dict(), "metric": 71.5}
    torch.save({**state, "args": argparse.Namespace(model=ARCHITECTURE, lr=0.1)}, tmp_path / "model_best.pth.tar")
    assert_loads(tmp_path / "model_best.pth.tar", network)


def test_a_state_dict_deeper_in_a_checkpoint_is_found(network: Any, tmp_path: Path) -> None:
    state = {"model_state_dict": network.state_dict(), "optimizer_state_dict": {"state": {0: {"step": torch.ones(1)}}}}
    torch.save({"epoch": 9, "loss": 0.5, **state}, tmp_path / "checkpoint.pt")
    assert_loads(tmp_path / "checkpoint.pt", network)


def test_a_checkpoint_of_pyslowfast_is_loaded(network: Any, tmp_path: Path) -> None:
    state = {"epoch": 9, "model_state": network.state_dict(), "optimizer_state": {"state": {}}, "cfg": "MODEL: {}\n"}
    torch.save(state, tmp_path / "checkpoint_epoch_00009.pyth")
    assert_loads(tmp_path / "checkpoint_epoch_00009.pyth", network)


def test_weights_of_a_reversible_network_are_refused_with_what_loads_them(tmp_path: Path) -> None:
    small = {"img_size": 8, "patch_size": 4, "depth": 1}
    source, path = timm.create_model("petra_revvit_micro", **small), tmp_path / "REV_VIT_S.pyth"
    torch.save({"model_state": source.state_dict()}, path)
    with pytest.raises(UserError, match=r"is reversible already.*create_model\('petra_revvit_micro', checkpoint_path="):
        load_source(str(path), "petra_revvit_micro")
    loaded = timm.create_model("petra_revvit_micro", checkpoint_path=str(path), **small)
    assert torch.equal(loaded.pos_embed, source.pos_embed)


@pytest.mark.parametrize("text", ["hello world\n", "version https://git-lfs.github.com/spec/v1\n", "", "{}", "I1\n."])
def test_a_file_that_is_no_checkpoint_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "notes.pth").write_text(text)
    with pytest.raises(UserError, match=r"notes\.pth (cannot be read|is no plain file|holds no state dict)[^\n]*$"):
        load_source(str(tmp_path / "notes.pth"), ARCHITECTURE)


def test_a_whole_module_is_refused_by_the_name_of_its_class(network: Any, tmp_path: Path) -> None:
    torch.save(network, tmp_path / "whole.pth")
    with pytest.raises(UserError, match=r"would run code when loaded \(timm\.models\.resnet\.ResNet\)"):
        load_source(str(tmp_path / "whole.pth"), ARCHITECTURE)


def inside(name: str, network: Any) -> dict[str, Tensor]:
    return {f"{name}.{key}": x for key, x in network.state_dict().items()}


def test_a_network_inside_a_training_module_is_found(network: Any, tmp_path: Path) -> None:
    torch.save({"state_dict": {**inside("model", network), "loss.weight": torch.ones(5)}}, tmp_path / "last.ckpt")
    assert_loads(tmp_path / "last.ckpt", network)


def test_two_networks_in_one_file_are_refused_by_name(network: Any, tmp_path: Path) -> None:
    torch.save({"state_dict": inside("student", network) | inside("teacher", network)}, tmp_path / "last.ckpt")
    with pytest.raises(UserError, match=r"holds several networks \(student\., teacher\.\)"):
        load_source(str(tmp_path / "last.ckpt"), ARCHITECTURE)


def test_a_file_of_any_name_needs_its_architecture(network: Any, tmp_path: Path) -> None:
    torch.save(network.state_dict(), tmp_path / "last.ckpt")
    with pytest.raises(UserError, match=r"last\.ckpt holds weights only: say whose they are with --arch"):
        load_source(str(tmp_path / "last.ckpt"))


def test_a_missing_file_is_said_to_be_missing(tmp_path: Path) -> None:
    for name in ("gone.ckpt", "gone.pth.tar", "gone.PTH"):
        with pytest.raises(UserError, match=rf"there is no file {tmp_path / name}"):
            load_source(str(tmp_path / name), ARCHITECTURE)


def test_a_file_beside_does_not_hide_a_model_of_its_name(
    network: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("resnet18").write_text("notes")
    with pytest.raises(UserError, match="--arch goes with a file of weights"):
        load_source("resnet18", ARCHITECTURE)


def test_a_file_of_weights_is_not_timms_own(network: Any, tmp_path: Path) -> None:
    torch.save(timm.create_model("test_resnet", num_classes=1000).state_dict(), tmp_path / "own.pth")
    loaded = load_source(str(tmp_path / "own.pth"), "test_resnet")
    said = {"tag", "license", "hf_hub_id", "origin_url", "test_input_size"}
    assert not {key for key in said if loaded.pretrained_cfg.get(key)}
    assert names_of(loaded) is None


def test_an_average_of_torchs_training_is_loaded(network: Any, tmp_path: Path) -> None:
    averaged = torch.optim.swa_utils.AveragedModel(network)
    torch.save({"model": network.state_dict(), "model_ema": averaged.state_dict()}, tmp_path / "ema.pth")
    assert_loads(tmp_path / "ema.pth", network)
    torch.save(averaged.state_dict(), tmp_path / "bare.pth")
    assert_loads(tmp_path / "bare.pth", network)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.mul(100).to(torch.int8), "holds int8, not floating-point numbers: a quantized checkpoint"),
        (lambda x: x.to(torch.complex64), "holds complex64"),
        (lambda x: x.to_sparse(), "is sparse_coo, not dense"),
        (lambda x: x.to("meta"), "has no content"),
    ],
)
def test_weights_without_a_floating_point_value_are_refused_by_name(
    change: Any, message: str, network: Any, tmp_path: Path
) -> None:
    weights = network.state_dict()
    torch.save({**weights, "layer1.0.conv1.weight": change(weights["layer1.0.conv1.weight"])}, tmp_path / "odd.pth")
    with pytest.raises(UserError, match=rf"does not fit test_resnet: layer1\.0\.conv1\.weight {message}"):
        load_source(str(tmp_path / "odd.pth"), ARCHITECTURE)
