"""`petra-zoo evaluate`: what it writes beside the accuracy, and what it refuses before any work."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from petra_zoo.evaluation.checkpoint_evaluation import EvaluationOptions, evaluate_checkpoint
from tests.cli.test_main import petra_zoo
from tests.hub.checkpoints import untrained

DATA = ("--dataset", "synthetic:4x8x128", "--device", "cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return untrained(tmp_path_factory.mktemp("saved") / "model", num_classes=4)


def test_pictures_and_tables_are_written_and_the_calibration_is_told(model: Path, tmp_path: Path) -> None:
    plot, table, mistakes = (tmp_path / name for name in ("matrix.png", "classes.csv", "mistakes.png"))
    done = petra_zoo("evaluate", model, *DATA, "--plot", plot, "--csv", table, "--mistakes", mistakes)
    assert done.returncode == 0, done.stderr
    assert "  ECE    " in done.stdout
    with table.open() as file:
        assert sum(int(row["support"]) for row in csv.DictReader(file)) == 128
    for path in (plot, mistakes):
        with Image.open(path) as picture:
            assert min(picture.size) > 100


def test_several_data_sets_are_evaluated_in_turn(model: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name / "val" / "a").mkdir(parents=True)
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / name / "val" / "a" / f"{name}.png")
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "two" / "val" / "a" / "more.png")
    where = [word for name in ("one", "two") for word in ("--dataset", "folder", "--data-dir", tmp_path / name)]
    results = tmp_path / "r.csv"
    rows = json.loads(petra_zoo("evaluate", model, *where, "--json", "--results-file", results).stdout)
    assert [row["images"] for row in rows] == [1, 2]
    with results.open() as file:
        assert [row["dataset"] for row in csv.DictReader(file)] == ["folder", "folder"]


def test_folders_are_one_for_all_data_sets_or_one_for_each(model: Path, tmp_path: Path) -> None:
    where = [word for _ in range(3) for word in ("--dataset", "folder")]
    done = petra_zoo("evaluate", model, *where, "--data-dir", tmp_path, "--data-dir", tmp_path)
    assert (done.returncode, "3 data sets, 2 data folders" in done.stderr) == (2, True)


def test_flips_average_an_images_probabilities_with_its_mirror_images(model: Path) -> None:
    plain, flipped = (
        evaluate_checkpoint(str(model), "synthetic:4x8x128", options=EvaluationOptions(device="cpu", tta=tta))
        for tta in (False, True)
    )
    assert plain.evaluation.loss != flipped.evaluation.loss
    assert (plain.as_dict()["tta"], flipped.as_dict()["tta"]) == (False, True)


def test_a_symmetric_image_is_told_as_without_flips(model: Path, tmp_path: Path) -> None:
    (tmp_path / "val" / "a").mkdir(parents=True)
    half = np.random.default_rng(0).integers(0, 256, (8, 4, 3), dtype=np.uint8)
    Image.fromarray(np.concatenate([half, half[:, ::-1]], axis=1)).save(tmp_path / "val" / "a" / "0.png")
    losses = [
        evaluate_checkpoint(
            str(model), "folder", data_dir=tmp_path, options=EvaluationOptions(device="cpu", tta=tta)
        ).evaluation.loss
        for tta in (False, True)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--plot", "nowhere/a.png"), "there is no folder nowhere"),
        (("--csv", "."), "it is a folder"),
        (("--plot", "a.xyz"), "cannot write the plot a.xyz: expected a name that ends in .png"),
        (("--mistakes", "a.xyz"), "cannot write the picture a.xyz: expected a name that ends in .png"),
        (("--mistakes", "m.png", "--dataset", "digits"), "--mistakes takes one model and one data set"),
    ],
)
def test_what_cannot_be_written_is_refused_before_any_work(arguments: tuple[str, ...], said: str) -> None:
    done = petra_zoo("evaluate", "no/such/model", *DATA, *arguments)
    assert done.returncode == 2
    assert said in " ".join(done.stderr.split())


def test_a_run_is_evaluated_on_what_it_was_not_trained_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = untrained(tmp_path / "run", num_classes=2)
    for name, seed in (("a", 0), ("b", 1)):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(20):
            pixels = np.random.default_rng((seed, i)).integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / name / f"{i}.png")
    lines = ["model: petra_revnet_tiny", "dataset: folder", f"data_dir: {tmp_path / 'data'}", "val_fraction: 0.5"]
    (model / "recipe.yaml").write_text("\n".join(lines) + "\n")
    options = EvaluationOptions(device="cpu")
    images = evaluate_checkpoint(str(model), options=options).evaluation.images
    assert "has no splits" not in caplog.text  # the run has said it
    again = evaluate_checkpoint(str(model), "folder", data_dir=tmp_path / "data", options=options)
    assert images == again.evaluation.images
    assert 10 < images < 30
    assert "val_fraction=0.5" in caplog.text
