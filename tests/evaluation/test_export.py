"""Exported files compute what the model computes."""

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from petra_zoo.errors import UserError
from petra_zoo.evaluation import export as export_module
from petra_zoo.evaluation.checkpoint_evaluation import evaluate_checkpoint
from petra_zoo.evaluation.export import Dynamic, Format, export_model
from petra_zoo.evaluation.quantization import Int8Images
from tests.hub.saved_models import save


def run_onnx(path: Path, images: torch.Tensor) -> torch.Tensor:
    session = pytest.importorskip("onnxruntime").InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def onnx_metadata(path: Path) -> dict[str, str]:
    session = pytest.importorskip("onnxruntime").InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found: dict[str, str] = session.get_modelmeta().custom_metadata_map
    return found


def run_program(path: Path, images: torch.Tensor) -> torch.Tensor:
    return torch.export.load(str(path)).module()(images)


def saved_config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "model" / "config.json").read_text())
    return config["pretrained_cfg"]


@pytest.mark.parametrize("coupling", [*(pytest.param(g, marks=pytest.mark.slow) for g in (0.0, 1.0)), 0.5])
def test_onnx_computes_the_models_logits_for_every_coupling(tmp_path: Path, coupling: float) -> None:
    pytest.importorskip("onnxscript")
    model = save(tmp_path / "model", coupling=coupling)
    done = export_model(str(tmp_path / "model"), tmp_path / "model.onnx", dynamic=("batch",) if coupling == 0.5 else ())
    images = torch.randn(5 if done.dynamic else 1, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(run_onnx(done.path, images), model(images), rtol=1e-4, atol=1e-4)
    assert done.input_size == (3, 8, 8)
    assert done.error < 1e-5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "model.onnx"]
    said = onnx_metadata(done.path)
    assert json.loads(said["mean"]) == saved_config(tmp_path)["mean"]
    assert json.loads(said["input_size"]) == [3, 8, 8]


@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_torch_export_computes_the_models_logits_at_another_size(tmp_path: Path, dynamic: bool) -> None:
    model = save(tmp_path / "model", coupling=0.25)
    done = export_model(
        str(tmp_path / "model"),
        tmp_path / "model.pt2",
        format="torch-export",
        image_size=(16, 12),
        dynamic=("batch",) if dynamic else (),
    )
    images = torch.randn(7 if dynamic else 1, 3, 16, 12)
    with torch.no_grad():
        torch.testing.assert_close(run_program(done.path, images), model(images))


def test_a_program_says_how_images_become_its_input(tmp_path: Path) -> None:
    save(tmp_path / "model")
    done = export_model(str(tmp_path / "model"), tmp_path / "model.pt2", format="torch-export")
    said = dict.fromkeys(("mean", "std", "input_size"), "")
    torch.export.load(str(done.path), extra_files=said)
    assert json.loads(said["std"]) == saved_config(tmp_path)["std"]


def test_8_bits_cost_little_accuracy_and_leave_sums_as_they_are(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    done = export_model(
        "petra_revnet_tiny.digits", tmp_path / "m.onnx", dynamic=["batch"], int8=Int8Images("digits", count=64)
    )
    assert done.int8 is not None
    assert done.int8.int8_bytes < done.int8.bytes / 2
    assert done.int8.calibration_images == 64
    assert done.int8.top1 == evaluate_checkpoint("petra_revnet_tiny.digits", "digits").evaluation.top1
    assert done.int8.int8_top1 > 95
    nodes = onnx.load(done.path).graph.node
    made_by = {name: node for node in nodes for name in node.output}
    sums = [node for node in nodes if node.op_type == "Add"]
    rounded = [made_by[made_by[made_by[name].input[0]].input[0]]  # through DequantizeLinear and QuantizeLinear
               for node in sums for name in node.input if made_by[name].op_type == "DequantizeLinear"]  # fmt: skip
    assert len(sums) > len(rounded) > 7
    assert {node.op_type for node in rounded} == {"Conv"}, "branches and shortcuts, no stream"
    assert json.loads(onnx_metadata(done.path)["label_names"]) == [str(i) for i in range(10)]


@pytest.mark.slow
def test_8_bits_of_a_file_for_one_image(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    save(tmp_path / "model", num_classes=10)
    done = export_model(str(tmp_path / "model"), tmp_path / "m.onnx", int8=Int8Images("synthetic:10x8x24", count=8))
    assert done.int8 is not None
    assert (done.int8.calibration_images, done.int8.images) == (8, 24)
    assert run_onnx(done.path, torch.randn(1, 3, 8, 8)).shape == (1, 10)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["onnx", "torch-export"])
def test_images_of_any_size_in_an_opset_that_was_chosen(tmp_path: Path, format: Format) -> None:
    model = save(tmp_path / "model", coupling=0.5)
    opset = 20 if format == "onnx" else None
    dynamic: list[Dynamic] = ["batch", "size"]
    done = export_model(
        str(tmp_path / "model"), tmp_path / "m", format=format, image_size=(16, 16), dynamic=dynamic, opset=opset
    )
    assert done.shape == "Nx3xHxW"
    images = torch.randn(5, 3, 24, 12)
    with torch.no_grad():
        torch.testing.assert_close(
            (run_onnx if format == "onnx" else run_program)(done.path, images), model(images), rtol=1e-4, atol=1e-4
        )
    if format == "onnx":
        assert pytest.importorskip("onnx").load(done.path).opset_import[0].version == 20


@pytest.mark.slow
def test_a_program_that_does_not_take_what_it_promises_is_not_kept(tmp_path: Path) -> None:
    save(tmp_path / "model")  # whose last features are of one pixel: exporters take that for all there will be
    with pytest.raises(UserError, match=r"does not take what it should .*a larger --input-size"):
        export_model(str(tmp_path / "model"), tmp_path / "m", format="torch-export", dynamic=["size"])
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"opset": 11}, "--opset 11: expected 18 or later"),
        ({"opset": 20, "format": "torch-export"}, "--format torch-export has no opset: use --format onnx"),
        ({"int8": Int8Images("digits"), "format": "torch-export"}, "has no 8-bit numbers: use --format onnx"),
        ({"int8": Int8Images()}, "say which data set"),
        ({"int8": Int8Images("folder")}, "data set 'folder' needs data_dir=DIR"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_cannot_be_exported_is_refused_before_the_work(
    tmp_path: Path, wrong: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxscript")
    monkeypatch.setattr(export_module, "_write_onnx", None)
    with pytest.raises(UserError, match=re.escape(said)):
        export_model("petra_revnet_tiny.digits", tmp_path / "m", **wrong)
    assert not [*tmp_path.iterdir()]


def test_an_existing_file_is_overwritten_only_if_told(tmp_path: Path) -> None:
    output = tmp_path / "model.pt2"
    output.write_bytes(b"somebody's")
    with pytest.raises(UserError, match=r"model\.pt2 exists; choose another name, or overwrite it with --force"):
        export_model("petra_revnet_tiny.digits", output, format="torch-export")
    assert output.read_bytes() == b"somebody's"


def test_a_file_that_computes_something_else_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "model")
    output = tmp_path / "model.pt2"
    output.write_bytes(b"what was here before")
    real = export_module._write_program

    def wrong(model: Any, *arguments: Any) -> None:
        with torch.no_grad():
            model.fc.bias += 1.0
        real(model, *arguments)

    monkeypatch.setattr(export_module, "_write_program", wrong)
    with pytest.raises(UserError, match="differs from the model by"):
        export_model(str(tmp_path / "model"), output, format="torch-export", force=True)
    assert output.read_bytes() == b"what was here before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "model.pt2"]


def test_a_missing_extra_is_named_before_anything_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs onnx, onnxscript, onnxruntime: pip install 'petra-zoo\[export\]'"):
        export_model("no/such/model", tmp_path / "model.onnx")


def test_bad_places_and_sizes_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "model")
    with pytest.raises(UserError, match="there is no directory"):
        export_model(str(tmp_path / "model"), tmp_path / "no" / "model.pt2", format="torch-export")
    with pytest.raises(UserError, match="too small"):
        export_model(str(tmp_path / "model"), tmp_path / "model.pt2", format="torch-export", image_size=(4, 64))
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="cannot write"):
        export_model(str(tmp_path / "model"), tmp_path / "folder", format="torch-export")
