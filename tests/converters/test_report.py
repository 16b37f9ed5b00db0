"""The fidelity report: what it holds, its files, and what it needs."""

import json
import sys
from pathlib import Path

import pytest
from PIL import Image
from timm.models import save_for_hf

from petra_zoo.converters import CoupledRun, Fidelity
from petra_zoo.converters.memory_report import conversion_memory
from petra_zoo.converters.report import ConversionReport, check_report, write_report
from petra_zoo.errors import UserError
from petra_zoo.models import PetraRevNet
from petra_zoo.models.training_memory import StepBytes
from petra_zoo.reversible import LiveBytes
from tests.cli.test_main import petra_zoo
from tests.converters.networks import images, source


def report(labels: bool = True) -> ConversionReport:
    runs = [CoupledRun("layer1", 2, 0.0, 0, 0.0), CoupledRun("layer2", 22, 0.5, 7, 3e-5)]
    top1 = (91.5, 91.0) if labels else (None, None)
    same = Fidelity(200, 98.5, 0.0123, 0.004, *top1, runs)
    return ConversionReport("resnet101", "out", "digits", 1e-4, same, (3, 8, 8), MEMORY)


MEMORY = {
    "source": StepBytes(2**21, 2**22),
    "source, checkpointed": StepBytes(2**20, 2**21),
    "converted": StepBytes(2**19, 2**20),
}


def test_a_directory_gets_all_three_files(tmp_path: Path) -> None:
    files = write_report(report(), tmp_path / "report")
    assert [file.name for file in files] == ["fidelity.json", "fidelity.md", "fidelity.png"]
    content = json.loads(files[0].read_text())
    assert (content["source"], content["agreement"], content["runs"][1]["anchor_every"]) == ("resnet101", 98.5, 7)
    assert content["activation_bytes_per_image"]["converted"] == {"stored": 2**19, "peak": 2**20}
    with Image.open(files[2]) as picture:
        assert picture.width > 1000
        assert len(picture.convert("RGB").getcolors(10**6)) > 4  # bars, points, the tolerance


def test_the_markdown_is_made_for_a_model_card() -> None:
    lines = report().as_markdown().splitlines()
    for line in (
        "| same prediction | 98.50 % |",
        "| top-1, converted | 91.00 % |",
        "| activations per image at 8x8, source, checkpointed | 1.00 MiB (peak 2.00) |",
        "| layer1 | 2 | 0 | - | - |",
        "| layer2 | 22 | 0.5 | 7 blocks | 3.0e-05 |",
    ):
        assert line in lines
    assert "top-1" not in report(labels=False).as_markdown()


@pytest.mark.parametrize("name", ["r.json", "r.md", "r.png"])
def test_a_file_gets_its_own_kind(name: str, tmp_path: Path) -> None:
    assert write_report(report(labels=False), tmp_path / name) == [tmp_path / name]
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_the_picture_shows_the_peak_beside_what_is_stored() -> None:
    memory = report().draw().axes[2]
    assert [text.get_text() for text in memory.get_legend().get_texts()] == ["stored", "peak"]
    bars = [[round(bar.get_height(), 6) for bar in group] for group in memory.containers]
    assert bars == [[2.0, 1.0, 0.5], [4.0, 2.0, 1.0]]  # MiB, as in MEMORY


@pytest.mark.parametrize(
    ("asked", "taken"),
    [("r.json", "r.json"), ("kept", "kept/fidelity.md"), ("file", "file"), ("file/r.md", "file")],
)
def test_a_report_never_replaces_a_file(asked: str, taken: str, tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    for name in ("r.json", "kept/fidelity.md", "file"):
        (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=rf"{tmp_path / taken} exists already: choose another"):
        check_report(tmp_path / asked)
    check_report(tmp_path / "kept" / "new.json")


def test_a_picture_without_matplotlib_is_refused_before_anything_is_done(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for path in (tmp_path / "report", tmp_path / "r.png"):
        with pytest.raises(UserError, match=r"pip install 'petra-zoo\[plots\]'"):
            check_report(path)
    check_report(tmp_path / "r.json")
    with pytest.raises(UserError, match=r"expected a \.json, \.md or \.png file"):
        check_report(tmp_path / "r.txt")


def test_stored_activations_are_counted_per_image() -> None:
    network = source("resnet18")
    model = PetraRevNet.from_resnet(network, coupling=0.5)
    found = conversion_memory(network, model, (3, 64, 64))
    # Up to its peak a reversible step keeps the graphs of its last units: what it saves is the peak.
    assert found["converted"].peak < found["source, checkpointed"].peak < found["source"].peak
    assert found["converted"].stored < found["source"].stored
    network.train()
    with LiveBytes([*network.parameters(), *network.buffers()]) as memory:
        logits = network(images(8))
        assert logits.requires_grad
    assert abs(memory.now / 8 - found["source"].stored) < 0.05 * memory.now / 8  # what belongs to no image is small
    assert not model.training


@pytest.mark.slow
def test_the_command_writes_the_report_and_json(tmp_path: Path) -> None:
    network, path = source("resnet18", num_classes=10), tmp_path / "source"
    save_for_hf(network, str(path), safe_serialization=True, data_config={"input_size": (3, 64, 64)})
    where = ["--output", tmp_path / "out", "--report", tmp_path / "report"]
    data = ["--calibrate", "synthetic:10x64", "--calibration-images", "32"]
    done = petra_zoo("convert", path, "--coupling", "1", "--exact", *where, *data, "--json")
    assert done.returncode == 0, done.stderr
    content = json.loads(done.stdout)
    assert content["architecture"] == "petra_revnet18"
    assert [run["g"] for run in content["runs"]] == [1.0] * 4
    assert [run["error"] for run in content["runs"]] == [0.0] * 4  # exact
    assert [Path(file).name for file in content["report_files"]] == ["fidelity.json", "fidelity.md", "fidelity.png"]
    stored = json.loads((tmp_path / "report" / "fidelity.json").read_text())["activation_bytes_per_image"]
    assert stored["converted"]["stored"] < stored["source"]["stored"]
