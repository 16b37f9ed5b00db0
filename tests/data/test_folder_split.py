"""Folders of classes without splits: which images are for validation, and that nothing moves them."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from petra_zoo.data.datasets import DataError, ImageDataset, open_dataset
from petra_zoo.data.folder_split import validation_files


def write(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (2, 2, 3), dtype=np.uint8)).save(path)


def fill(folder: Path, *, count: int, classes: tuple[str, ...] = ("bee", "cat")) -> Path:
    for number, name in enumerate(classes):
        for i in range(count):
            write(folder / name / f"{i}.png", seed=1000 * number + i)
    return folder


def files(data: ImageDataset, root: Path) -> set[str]:
    return {str(Path(data.source(i)).relative_to(root)) for i in range(len(data))}


def sides(root: Path, **options: float) -> tuple[set[str], set[str]]:
    train, val = (open_dataset("folder", split, data_dir=root, **options) for split in ("train", "val"))  # type: ignore[arg-type]
    return files(train, root), files(val, root)


def test_every_image_is_on_one_side_and_every_class_on_both(tmp_path: Path) -> None:
    train, val = sides(fill(tmp_path, count=40), val_fraction=0.25)
    assert not train & val
    assert len(train | val) == 80
    for name in ("bee", "cat"):
        assert sum(file.startswith(name) for file in val) == pytest.approx(10, abs=5)


def test_a_new_image_moves_no_other(tmp_path: Path) -> None:
    train, val = sides(fill(tmp_path, count=20), val_fraction=0.3)
    for i in range(20, 40):
        write(tmp_path / "cat" / f"{i}.png", seed=5000 + i)
    more_train, more_val = sides(tmp_path, val_fraction=0.3)
    assert train <= more_train
    assert val <= more_val


def test_a_smaller_fraction_validates_on_a_part_of_what_a_larger_one_does(tmp_path: Path) -> None:
    fill(tmp_path, count=40)
    assert sides(tmp_path, val_fraction=0.1)[1] < sides(tmp_path, val_fraction=0.4)[1]


def test_a_folder_may_be_moved_and_another_seed_splits_otherwise(tmp_path: Path) -> None:
    _, val = sides(fill(tmp_path / "here", count=40), val_fraction=0.3)
    (tmp_path / "here").rename(tmp_path / "there")
    assert sides(tmp_path / "there", val_fraction=0.3)[1] == val
    assert sides(tmp_path / "there", val_fraction=0.3, seed=1)[1] != val


def test_copies_of_an_image_are_on_one_side(tmp_path: Path) -> None:
    fill(tmp_path, count=40)
    for i in range(40):
        (tmp_path / "cat" / f"copy of bee {i}.png").write_bytes((tmp_path / "bee" / f"{i}.png").read_bytes())
    val = sides(tmp_path, val_fraction=0.3)[1]
    assert all((f"bee/{i}.png" in val) == (f"cat/copy of bee {i}.png" in val) for i in range(40))


def test_the_share_is_that_of_many_names() -> None:
    names = [f"/data/{label}/{i}.jpg" for label in range(10) for i in range(500)]
    samples = [(name, int(Path(name).parent.name)) for name in names]
    assert len(validation_files(samples, Path("/data"), fraction=0.1)) == pytest.approx(500, abs=70)


def test_the_split_is_said_with_the_classes_that_get_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fill(tmp_path, count=40)
    fill(tmp_path, count=1, classes=("dog",))
    sides(tmp_path)
    assert f"{tmp_path} has no splits: val_fraction=0.1 makes" in caplog.text
    assert "none of class dog" in caplog.text
    assert len(caplog.records) == 1


def test_too_few_images_say_what_to_change(tmp_path: Path) -> None:
    fill(tmp_path, count=1)
    for fraction in (0.0001, 0.9999):
        with pytest.raises(DataError, match=r"no class has two images, one to train on and one to validate on: add"):
            open_dataset("folder", "val", data_dir=tmp_path, val_fraction=fraction)


@pytest.mark.parametrize("fraction", [0.0001, 0.5, 0.9999])
def test_a_class_of_two_images_has_one_on_either_side(tmp_path: Path, fraction: float) -> None:
    train, val = sides(fill(tmp_path, count=2, classes=("ant", "bee", "cat")), val_fraction=fraction)
    assert sorted(name[:3] for name in train) == sorted(name[:3] for name in val) == ["ant", "bee", "cat"]


def test_no_image_that_was_trained_on_is_validated_on_because_others_came(tmp_path: Path) -> None:
    train, _ = sides(fill(tmp_path, count=3))
    for i in range(3, 30):
        write(tmp_path / "cat" / f"{i}.png", seed=5000 + i)
        more_train, more_val = sides(tmp_path)
        assert train <= more_train
        assert not more_val & train
        train = more_train


def test_files_that_are_no_images_are_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (fill(tmp_path, count=20) / "cat" / "notes.txt").write_text("")
    sides(tmp_path)
    assert caplog.text.count("1 other file is ignored (1 .txt)") == 1


@pytest.mark.parametrize("classes", [("Train", "Val"), ("val", "cat"), ("images",)])
def test_folders_that_look_like_something_else_than_classes_are_not_split(
    tmp_path: Path, classes: tuple[str, ...]
) -> None:
    with pytest.raises(DataError, match=r"has no 'train' folder; expected .* or DIR/CLASS/IMAGE"):
        open_dataset("folder", "train", data_dir=fill(tmp_path, count=2, classes=classes))
