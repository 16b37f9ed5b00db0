"""Converted networks saved for timm, the files that sources come from, and the command."""

import json
import os
import pickle
import re
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf

from petra_zoo.converters import convert, load_source, save_converted
from petra_zoo.converters.resnet_identity import take_identity
from petra_zoo.errors import UserError
from petra_zoo.models import PetraRevNet
from petra_zoo.models.layer_arguments import from_words
from tests.cli.test_main import petra_zoo
from tests.converters.networks import images, source
from tests.models.test_petra_revnet import convertible

LABELS = ["ant", "bee", "cat", "dog", "elk"]


@pytest.fixture(scope="module")
def saved_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained-like resnet18 as timm saves it, with preprocessing of its own."""
    path = tmp_path_factory.mktemp("source") / "resnet18"
    data = {"input_size": (3, 32, 32), "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "crop_pct": 0.9}
    save_for_hf(
        source("resnet18"), str(path), model_config={"label_names": LABELS}, safe_serialization=True, data_config=data
    )
    return path


@pytest.mark.parametrize(
    "name",
    [
        "seresnet18",
        "resnetblur18",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("resnet18", "resnet18d", "ecaresnet26t", "resnext50_32x4d")
        ),
    ],
)
def test_timm_rebuilds_a_converted_network(name: str, tmp_path: Path) -> None:
    smaller = {"layers": (2, 2, 2, 2), "channels": (16, 16, 16, 16)} if "resnext" in name else {}
    network = source(name, **smaller)
    model = convert(network, coupling=[0.5, 0.25, 1.0, 0.0])
    save_converted(model, tmp_path / "out")
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    assert type(loaded) is PetraRevNet
    assert torch.equal(loaded(images()), model(images()))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
def test_anchors_and_exactness_are_saved(tmp_path: Path) -> None:
    for exact, grid in ((False, 0.0), (True, 2.0**-12)):
        model = convert(source("resnet34"), coupling=1 / 16, tolerance=1e-7, exact=exact)
        anchors = [layer.anchor_every for layer in model.coupled_layers()]
        assert any(anchors) or exact  # the grid keeps a run this short exact
        save_converted(model, tmp_path / str(exact))
        loaded = timm.create_model(f"local-dir:{tmp_path / str(exact)}", pretrained=True)
        assert [layer.anchor_every for layer in loaded.coupled_layers()] == anchors
        assert [layer.grid for layer in loaded.coupled_layers()] == [grid] * 4


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_timm_rebuilds_every_convertible_resnet_but_the_pruned() -> None:
    for name in convertible():
        model = PetraRevNet.from_resnet(timm.create_model(name, device="meta", num_classes=7))
        take_identity(model, {})
        architecture = model.pretrained_cfg["architecture"]
        if name in ("ecaresnet50d_pruned", "ecaresnet101d_pruned"):
            assert architecture == name
            continue
        again = timm.create_model(architecture, device="meta", **model._model_args)
        assert repr(again) == repr(model), name


def test_a_network_that_timm_did_not_make_cannot_be_saved_for_timm(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"make the source with timm\.create_model"):
        save_converted(convert(timm.create_model("resnet18", act_layer=torch.nn.SiLU)), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"aa_layer": "sharp"}, "'avg' or 'blur', not 'sharp'"),
        ({"block": ["basic", "large"]}, "'basic' or 'bottleneck', not 'large'"),
    ],
)
def test_layers_by_unknown_words_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_words(arguments)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_file_of_weights_needs_its_architecture(suffix: str, tmp_path: Path) -> None:
    network = source("resnet18")
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save({"state_dict": {f"module.{key}": x for key, x in network.state_dict().items()}}, path)
    else:
        save_file(network.state_dict(), path)
    assert torch.equal(load_source(str(path), "resnet18")(images()), network(images()))
    with pytest.raises(UserError, match="say whose they are with --arch"):
        load_source(str(path))


class Code:
    def __reduce__(self) -> object:
        return os.system, ("touch /tmp/petra_zoo_was_here",)


def broken(kind: str, path: Path) -> str:
    """Writes a broken file of weights; gives the message that it must cause."""
    weights = source("resnet18").state_dict()
    if kind == "missing":
        del weights["layer1.0.conv1.weight"], weights["bn1.bias"]
        message = "missing bn1.bias, layer1.0.conv1.weight"
    elif kind == "extra":
        weights["layer9.weight"] = torch.zeros(1)
        message = "unexpected layer9.weight"
    elif kind == "shape":
        weights["layer1.0.conv1.weight"] = torch.zeros(64, 32, 3, 3)
        message = r"layer1.0.conv1.weight is \[64, 32, 3, 3\] instead of \[64, 64, 3, 3\]"
    elif kind == "nan":
        weights["fc.bias"][2] = float("nan")
        message = "fc.bias holds values that are not finite"
    elif kind == "reversible":
        weights["layer1.coupling"] = torch.tensor(0.5)
        message = "reversible already"
    elif kind == "code":
        weights["bad"] = Code()
        message = r"would run code when loaded \(posix.system\) and is refused"
    elif kind == "pickle":
        path.write_bytes(pickle.dumps({"bad": Code()}, protocol=5))
        return "is refused"
    elif kind == "list":
        torch.save([1, 2], path)
        return "holds no state dict"
    else:
        message = "cannot be read, it is damaged"
    torch.save(weights, path)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-5000])
    return message


@pytest.mark.parametrize(
    "kind", ["missing", "extra", "shape", "nan", "reversible", "code", "pickle", "list", "truncated"]
)
def test_a_broken_file_is_one_clear_line_and_nothing_is_written(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    message = broken(kind, path)
    done = petra_zoo("convert", path, "--arch", "resnet18", "--output", tmp_path / "out")
    assert done.returncode == 2
    assert re.search(message, done.stderr), done.stderr
    assert done.stderr.count("\n") == 1
    assert [found.name for found in tmp_path.iterdir()] == ["weights.pth"]
    assert not Path("/tmp/petra_zoo_was_here").exists()


def test_a_truncated_safetensors_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(source("resnet18").state_dict(), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot be read, it is damaged"):
        load_source(str(path), "resnet18")


def test_the_command_converts_compares_and_saves(saved_source: Path, tmp_path: Path) -> None:
    out, report = tmp_path / "out", tmp_path / "report.json"
    data = ["--calibrate", "synthetic:5x32", "--calibration-images", "128", "--report", report]
    done = petra_zoo("convert", saved_source, "--output", out, "--for", "petra", *data)
    assert done.returncode == 0, done.stderr
    for words in (f"saved {out}: petra_revnet18", "coupling 0.0625", "estimated on 128 images", "top-1  source"):
        assert words in done.stdout
    model = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    assert [layer.g() for layer in model.coupled_layers()] == [1 / 16] * 4
    for key, value in {"input_size": (3, 32, 32), "mean": (0.1, 0.2, 0.3), "crop_pct": 0.9}.items():
        assert json.loads(json.dumps(model.pretrained_cfg[key])) == json.loads(json.dumps(value))
    assert model.pretrained_cfg["label_names"] == LABELS
    content = json.loads(report.read_text())
    assert content["images"] == 128
    assert content["dataset"] == "synthetic:5x32"
    assert [run["g"] for run in content["runs"]] == [1 / 16] * 4
    again = petra_zoo("convert", out, "--output", tmp_path / "again")
    assert again.returncode == 2
    assert "reversible already" in again.stderr


def test_the_command_keeps_the_function_at_coupling_0(saved_source: Path, tmp_path: Path) -> None:
    done = petra_zoo("convert", f"local-dir:{saved_source}", "--output", tmp_path / "out", "--coupling", "0,0,0,0")
    assert done.returncode == 0, done.stderr
    network = timm.create_model(f"local-dir:{saved_source}", pretrained=True).eval()
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    assert torch.equal(model(images()), network(images()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--coupling", "0.3"], "multiple of 1/256"),
        (["--coupling", "high"], "--coupling high: expected auto, one number, or four"),
        (["--coupling", "0.5,0.5"], "one per layer; got 2"),
        (["--tolerance", "0"], "tolerance=0"),
        (["--arch", "resnet18"], "--arch goes with a file of weights"),
        (["--report", "r.json"], "add --calibrate DATASET"),
        (["--calibrate", "digit"], "did you mean digits"),
    ],
)
def test_bad_use_is_one_line_and_nothing_is_written(
    arguments: list[str], message: str, saved_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = petra_zoo("convert", saved_source, "--output", "out", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_an_output_that_exists_is_left_alone(saved_source: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    done = petra_zoo("convert", saved_source, "--output", tmp_path)
    assert done.returncode == 2
    assert f"{tmp_path} already holds something else" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    (tmp_path / "empty").mkdir()
    assert petra_zoo("convert", saved_source, "--output", tmp_path / "empty").returncode == 0


def test_an_output_that_cannot_be_written_is_one_line(saved_source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = petra_zoo("convert", saved_source, "--output", tmp_path / "file" / "out")
    assert done.returncode == 2
    assert "cannot write" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_network_of_another_type_is_saved(dtype: torch.dtype, tmp_path: Path) -> None:
    network = source("test_resnet").to(dtype)
    model = convert(network, coupling=0.0)
    save_converted(model, tmp_path / "out")
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    assert torch.equal(loaded(images()), model.float()(images()))
