"""Many image files: where they are found, what is written, and what of unreadable ones."""

import csv
import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open

from petra_zoo.errors import UserError
from petra_zoo.evaluation.bulk_prediction import find_image_files, write_predictions
from petra_zoo.evaluation.prediction import PredictionOptions, predict_images
from tests.cli.test_main import petra_zoo
from tests.evaluation.test_prediction import LABELS, image
from tests.hub.saved_models import save


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "model"
    save(path, LABELS)
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    (folder / "inner").mkdir(parents=True)
    for seed, name in enumerate(("1.png", "2.jpg", "10.png", "inner/3.png")):
        image(folder / name, seed=seed)
    (folder / "notes.txt").write_text("no image")
    return folder


def names(files: list[Path], folder: Path) -> list[str]:
    return [str(file.relative_to(folder)) for file in files]


def test_folders_and_wildcards_become_files(photos: Path) -> None:
    assert sorted(names(find_image_files([photos]), photos)) == ["1.png", "10.png", "2.jpg", "inner/3.png"]
    assert names(find_image_files([photos / "*.png"]), photos) == ["1.png", "10.png"]
    assert set(names(find_image_files([photos / "**" / "*.png"]), photos)) == {"1.png", "10.png", "inner/3.png"}
    assert find_image_files([photos / "1.png", photos / "1.png"]) == 2 * [photos / "1.png"]


def test_places_without_images_are_named(photos: Path) -> None:
    with pytest.raises(UserError, match=r"nothing matches .*\*\.gif"):
        find_image_files([photos / "*.gif"])
    (photos / "empty").mkdir()
    with pytest.raises(UserError, match=r"there is no image in .*empty"):
        find_image_files([photos / "empty"])


def test_a_missing_file_is_named_before_others_are_looked_at(photos: Path) -> None:
    with pytest.raises(UserError, match=r"typo\.png cannot be read as an image: No such file"):
        find_image_files([photos, photos / "typo.png"])


def test_the_csv_has_a_row_for_each_image_in_order(model: Path, photos: Path, tmp_path: Path) -> None:
    files = find_image_files([photos])
    options = PredictionOptions(topk=2, batch_size=3, device="cpu")
    assert write_predictions(str(model), files, output=tmp_path / "p.csv", options=options) == (4, 0)
    with (tmp_path / "p.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["image", "label", "probability", "label_2", "probability_2"]
    for row, found in zip(rows, predict_images(str(model), files, topk=2, device="cpu"), strict=True):
        assert (row["image"], row["label"], row["label_2"]) == (found.image, *(guess.label for guess in found.guesses))
        assert float(row["probability"]) == pytest.approx(found.guesses[0].probability, rel=1e-4)


def test_json_lines_are_what_json_says(model: Path, photos: Path, tmp_path: Path) -> None:
    done = petra_zoo("predict", photos, "-m", model, "--output", tmp_path / "p.jsonl")
    assert done.stdout == f"saved {tmp_path / 'p.jsonl'}: 4 images\n"
    lines = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert [line["image"] for line in lines] == [str(file) for file in find_image_files([photos])]
    assert [len(line["guesses"]) for line in lines] == [4] * 4


def test_features_are_what_the_classifier_reads(model: Path, photos: Path, tmp_path: Path) -> None:
    files = find_image_files([photos])
    options = PredictionOptions(batch_size=3, device="cpu")
    write_predictions(str(model), files, features=tmp_path / "f.safetensors", options=options)
    with safe_open(tmp_path / "f.safetensors", "pt") as file:
        features, metadata = file.get_tensor("features"), file.metadata()
    assert json.loads(metadata["images"]) == [str(file) for file in files]
    loaded = timm.create_model(f"local-dir:{model}", pretrained=True).eval()
    with torch.no_grad():
        probabilities = loaded.get_classifier()(features).softmax(1)
    expected = [found.guesses[0].probability for found in predict_images(str(model), files, device="cpu")]
    assert probabilities.amax(1).tolist() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_left_out_everywhere(model: Path, photos: Path, tmp_path: Path, workers: int) -> None:
    (photos / "2.jpg").write_bytes(b"no image")
    options = PredictionOptions(batch_size=2, workers=workers, device="cpu", on_bad_image="skip")
    output, features = tmp_path / "p.csv", tmp_path / "f.safetensors"
    found = find_image_files([photos])
    assert write_predictions(str(model), found, output=output, features=features, options=options) == (3, 1)
    kept = [str(file) for file in found if file.name != "2.jpg"]
    with output.open() as file:
        assert [row["image"] for row in csv.DictReader(file)] == kept
    with safe_open(features, "pt") as opened:
        assert json.loads(opened.metadata()["images"]) == kept


def test_an_unreadable_image_ends_it_where_nothing_else_is_said(model: Path, photos: Path, tmp_path: Path) -> None:
    (photos / "10.png").write_bytes(b"no image")
    done = petra_zoo("predict", photos, "-m", model, "--output", tmp_path / "p.csv", "--batch-size", 1)
    assert done.returncode == 2
    assert "10.png cannot be read as an image" in done.stderr
    skipped = petra_zoo("predict", photos, "-m", model, "--output", tmp_path / "p.csv", "--on-bad-image", "skip")
    assert "3 images, 1 unreadable left out" in skipped.stdout


@pytest.mark.parametrize("name", ["p.txt", "nowhere/p.csv"])
def test_a_table_that_cannot_be_written_is_known_before_the_model_is_loaded(photos: Path, name: str) -> None:
    with pytest.raises(UserError, match="cannot write"):
        write_predictions("no/such/model", find_image_files([photos]), output=photos / name)
