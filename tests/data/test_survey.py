"""Looking at a data set: what it is made of, what is wrong with it, and samples as a network sees them."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from petra_zoo.data.contact_sheet import Tile, contact_sheet, sample_sheet
from petra_zoo.data.datasets import open_dataset
from petra_zoo.data.preprocessing import Preprocessing
from petra_zoo.data.survey import Survey, survey
from petra_zoo.settings.augmentation import Augmentation
from tests.cli.test_main import petra_zoo


def write(path: Path, seed: int, size: tuple[int, int] = (12, 8)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    width, height = size
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(4):
        write(tmp_path / "train" / "bee" / f"{i}.png", i)
    write(tmp_path / "train" / "cat" / "0.jpg", 10, (20, 10))
    write(tmp_path / "train" / "cat" / "same as bee 0.png", 0)
    write(tmp_path / "val" / "bee" / "0.png", 20)
    write(tmp_path / "val" / "cat" / "same as bee 1.bmp", 1)
    (tmp_path / "val" / "cat" / "broken.png").write_bytes(b"no image")
    return tmp_path


def surveyed(folder: Path, **options: int) -> Survey:
    train, val = (open_dataset("folder", split, data_dir=folder) for split in ("train", "val"))  # type: ignore[arg-type]
    return survey("folder", [("train", train), ("val", val)], **options)


@pytest.mark.parametrize("workers", [0, 2])
def test_images_are_counted_by_class_size_and_format(folder: Path, workers: int) -> None:
    train, val = surveyed(folder, workers=workers).splits
    assert train.per_class == {"bee": 4, "cat": 2}
    assert train.imbalance == 2.0
    assert dict(train.sizes) == {(12, 8): 5, (20, 10): 1}
    assert dict(train.formats) == {"PNG RGB": 5, "JPEG RGB": 1}
    assert (val.images, val.looked_at, sum(val.sizes.values())) == (3, 3, 2)


def test_unreadable_images_are_named_with_the_reason(folder: Path) -> None:
    found = surveyed(folder)
    assert found.unreadable == 1
    (bad,) = found.splits[1].unreadable
    assert bad.source.endswith("broken.png")
    assert "no image format" in bad.reason


def test_copies_are_found_across_formats_splits_and_classes(folder: Path) -> None:
    found = surveyed(folder)
    names = [{Path(copy.source).name for copy in group} for group in found.copies]
    assert names == [{"0.png", "same as bee 0.png"}, {"1.png", "same as bee 1.bmp"}]
    assert found.across == found.copies[1:]
    assert found.contradicting == found.copies


def test_mean_and_std_are_those_of_the_pixels() -> None:
    data = open_dataset("digits", "val")
    pixels = np.stack([np.asarray(data[i][0]) for i in range(len(data))]) / 255
    (found,) = survey("digits", [("val", data)]).splits
    np.testing.assert_allclose(found.mean, pixels.mean((0, 1, 2)), rtol=1e-9)
    np.testing.assert_allclose(found.std, pixels.std((0, 1, 2)), rtol=1e-9)


def test_of_a_large_split_a_part_may_be_read_but_all_of_it_is_counted() -> None:
    (found,) = survey("shapes", [("train", open_dataset("shapes:200x10", "train"))], most=7).splits
    assert (found.images, found.looked_at) == (200, 7)
    assert sum(found.per_class.values()) == 200


def test_the_command_tells_a_person_and_leaves_1_where_an_image_is_unreadable(folder: Path) -> None:
    done = petra_zoo("data", "folder", "--data-dir", folder)
    assert done.returncode == 1
    for words in (
        "train: 6 images of 2 classes",
        "12x8 to 20x10, median 12x8",
        "5 PNG RGB, 1 JPEG RGB",
        "the largest class has 2.0 times",
        "1 cannot be read",
        "1 the same image to train on and to validate on",
        "2 the same image in several classes",
        "bee\t4\t1",
    ):
        assert words in done.stdout, words


def test_the_command_tells_a_program(folder: Path) -> None:
    found = json.loads(petra_zoo("data", "folder", "--data-dir", folder, "--json").stdout)
    assert [split["images"] for split in found["splits"]] == [6, 3]
    assert found["splits"][0]["sizes"][0] == {"width": 12, "height": 8, "images": 5}
    assert len(found["copies"]) == 2


def test_a_sheet_shows_the_batch_that_the_network_gets() -> None:
    data = open_dataset("digits", "train")
    preprocessing = Preprocessing((3, 8, 8), data.mean, data.std, crop_pct=1.0)
    plain = np.asarray(sample_sheet(data, preprocessing, Augmentation(no_aug=True), count=3))
    first = np.random.default_rng((0, 0, 0)).permutation(len(data))[:3]
    shown = plain[8 : 8 + 128 : 16, 8 : 8 + 128 : 16]  # a pixel of 8x8 is 16 wide
    assert np.array_equal(shown, np.asarray(data[int(first[0])][0]))
    mixed = sample_sheet(data, preprocessing, Augmentation(mixup=1.0, hflip=0.0, scale=(1.0, 1.0)), count=3)
    assert not np.array_equal(plain, np.asarray(mixed))


def test_a_recipes_size_and_augmentation_hold_for_its_sheet(tmp_path: Path) -> None:
    wanted = ("shapes:40x10", "--recipe", "shapes/petra_revnet_tiny", "--count", 6)
    done = petra_zoo("data", *wanted, "img_size=16", "--sheet", tmp_path / "a.png")
    assert done.returncode == 0, done.stderr
    petra_zoo("data", *wanted, "img_size=16", "no_aug=true", "--sheet", tmp_path / "b.png")
    with Image.open(tmp_path / "a.png") as a, Image.open(tmp_path / "b.png") as b:
        assert a.size[0] == b.size[0] == 6 * 136 + 8
        assert a.tobytes() != b.tobytes()


def test_long_names_are_broken_and_never_cut() -> None:
    image = Image.new("RGB", (4, 4), "red")
    short, long = (contact_sheet([Tile(image, [name])]) for name in ("ant", "a very long name of a class " * 3))
    assert long.height >= short.height + 2 * 15


def test_names_of_classes_are_drawn_with_their_accents() -> None:
    image = Image.new("RGB", (4, 4), "red")
    first, second = (
        contact_sheet([Tile(image, [letter])])
        for letter in ("\N{LATIN SMALL LETTER A WITH DIAERESIS}", "\N{LATIN SMALL LETTER E WITH ACUTE}")
    )
    assert first.tobytes() != second.tobytes()  # boxes are all alike


def test_a_sheet_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    done = petra_zoo("data", "shapes:40x10", "--sheet", tmp_path / "nowhere" / "a.png")
    assert done.returncode == 2
    assert "there is no folder" in done.stderr
