"""The data sets: what they hold, where they come from, and what they say when something is missing or broken."""

import builtins
import pickle
import re
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw
from torchvision.datasets import CIFAR10

from petra_zoo.data import stored_datasets
from petra_zoo.data.datasets import DATASETS, DataError, ImageDataset, open_dataset, register_dataset
from petra_zoo.data.drawn_datasets import ShapesDataset
from petra_zoo.errors import UserError


def write_images(folder: Path, count: int = 1) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        Image.new("RGB", (10, 12), (number, 50, 200)).save(folder / f"{number}.png")


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    for split in ("train", "val"):
        for name in ("c2", "c10"):
            write_images(tmp_path / split / name, 3)
    return tmp_path


def pixels(dataset: ImageDataset, index: int) -> list[int]:
    return np.asarray(dataset[index][0]).ravel().tolist()


def test_digits_are_1797_small_images_split_by_class() -> None:
    train, val = open_dataset("digits", "train"), open_dataset("digits", "val")
    assert (len(train), len(val)) == (1437, 360)
    assert train.num_classes == 10
    assert train[0][0].size == (8, 8)
    assert train[0][0].mode == "RGB"
    shares = np.bincount([val[index][1] for index in range(len(val))])
    assert shares.min() >= 34


def test_digits_split_does_not_follow_the_seed() -> None:
    assert pixels(open_dataset("digits", "val", seed=1), 5) == pixels(open_dataset("digits", "val", seed=2), 5)


def test_digits_without_scikit_learn_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def without_sklearn(name: str, *rest: Any) -> Any:
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real_import(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_sklearn)
    with pytest.raises(DataError, match=r"pip install 'petra-zoo\[demo\]'"):
        open_dataset("digits", "train")


def test_a_drawn_sample_depends_on_seed_split_and_index_alone() -> None:
    shapes = open_dataset("shapes", "train", seed=3)
    first = pixels(shapes, 7)
    assert pixels(open_dataset("shapes", "train", seed=3), 7) == first
    assert pixels(open_dataset("shapes", "train", seed=4), 7) != first
    assert pixels(open_dataset("shapes", "val", seed=3), 7) != first
    assert pixels(shapes, 17) != first


def test_a_drawn_picture_is_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    draw = ShapesDataset._draw
    monkeypatch.setattr(ShapesDataset, "_draw", lambda *drawing: drawn.append(drawing) or draw(*drawing))
    first, _ = ShapesDataset("train", 77).read(3)
    changed = ImageDraw.Draw(first)
    changed.rectangle((0, 0, 31, 31), fill=(255, 0, 0))  # nobody else's picture changes
    again, _ = ShapesDataset("train", 77).read(3)
    other, _ = ShapesDataset("val", 77).read(3)
    assert len(drawn) == 2
    assert again.tobytes() not in (first.tobytes(), other.tobytes())


def test_shapes_of_another_number_begin_with_the_same_pictures() -> None:
    many, few = (open_dataset(name, "val") for name in ("shapes:40x30", "shapes"))
    assert len(many) == 30
    assert [many.read(i)[0].tobytes() for i in range(30)] == [few.read(i)[0].tobytes() for i in range(30)]
    with pytest.raises(DataError, match="unknown data set 'shapes:4k'"):
        open_dataset("shapes:4k", "val")


def test_shapes_are_balanced_and_fast_to_draw() -> None:
    shapes = open_dataset("shapes", "val")
    assert len(open_dataset("shapes", "train")) == 4000
    start = time.process_time()
    labels = [shapes[index][1] for index in range(len(shapes))]
    assert time.process_time() - start < 3  # about 0.7 s: room for a busy machine
    assert np.bincount(labels).tolist() == [100] * 10


def test_synthetic_takes_classes_size_and_length_from_its_name() -> None:
    assert [len(open_dataset(f"synthetic:4x8{length}", "val")) for length in ("", "x48")] == [1024, 48]
    noise = open_dataset("synthetic:1000x24", "train")
    assert (noise.num_classes, noise.image_size, noise[0][0].size) == (1000, 24, (24, 24))
    assert open_dataset("synthetic", "train").image_size == 32


def test_unknown_name_gives_the_nearest() -> None:
    with pytest.raises(DataError, match="unknown data set 'cifar11'; did you mean cifar10"):
        open_dataset("cifar11", "train")


@pytest.mark.parametrize("name", ["photos", "./photos", "photos/"])
def test_a_folder_in_the_place_of_a_name_is_told_what_to_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path)
    message = f"unknown data set '{name}'; for the images in that folder say folder, with data_dir={name}"
    with pytest.raises(DataError, match=re.escape(message)):
        open_dataset(name, "train")


def test_a_stream_is_refused() -> None:
    with pytest.raises(DataError, match="stream"):
        open_dataset("wds/imagenet", "train")


def test_cifar10_is_read_from_its_own_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # torchvision checks the real files' checksums; the small ones here have others.
    monkeypatch.setattr(CIFAR10, "train_list", [["data_batch_1", None]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", None]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": None})
    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    data = np.zeros((4, 3072), dtype=np.uint8)
    data[:, :1024] = 255  # the red plane comes first
    for name in ("data_batch_1", "test_batch"):
        (folder / name).write_bytes(pickle.dumps({"data": data, "labels": [0, 1, 2, 9]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"name {label}" for label in range(10)]}))

    cifar = open_dataset("cifar10", "val", data_dir=tmp_path)
    assert len(cifar) == 4
    assert cifar.class_names[9] == "name 9"
    image, label = cifar[3]
    assert (image.getpixel((31, 31)), label) == ((255, 0, 0), 9)


def test_missing_cifar_says_where_it_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no complete cifar100 in .*cifar-100-python.*dataset_download=true"):
        open_dataset("cifar100", "train", data_dir=tmp_path)


def write_imagenet32(folder: Path, labels: list[int]) -> None:
    data = np.zeros((len(labels), 3072), dtype=np.uint8)
    data[:, 2048:] = 255  # blue comes last
    for name in ["val_data"] + [f"train_data_batch_{number}" for number in range(1, 11)]:
        np.savez(folder / f"{name}.npz", data=data, labels=np.array(labels))


def test_imagenet32_is_read_from_npz_batches(tmp_path: Path) -> None:
    write_imagenet32(tmp_path, [1, 1000])
    train = open_dataset("imagenet32", "train", data_dir=tmp_path)
    assert (len(train), train.num_classes, train.image_size) == (20, 1000, 32)
    image, label = train[19]
    assert (image.getpixel((0, 0)), label) == ((0, 0, 255), 999)


def test_a_label_out_of_range_names_sample_and_label(tmp_path: Path) -> None:
    write_imagenet32(tmp_path, [5, 1001])
    with pytest.raises(DataError, match=r"index 1\) has label 1000; expected 0..999"):
        open_dataset("imagenet32", "val", data_dir=tmp_path)


def test_imagenet32_refuses_pickled_objects(tmp_path: Path) -> None:
    np.savez(tmp_path / "val_data.npz", data=np.array([{}], dtype=object), labels=np.array([1]))
    with pytest.raises(DataError, match="allow_pickle=False"):
        open_dataset("imagenet32", "val", data_dir=tmp_path)


def test_a_missing_imagenet32_batch_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train_data_batch_1\.npz is missing"):
        open_dataset("imagenet32", "train", data_dir=tmp_path)


def test_folder_classes_are_in_timms_order(image_folder: Path) -> None:
    train = open_dataset("folder", "train", data_dir=image_folder)
    assert train.class_names == ["c2", "c10"]
    assert [train[index][1] for index in range(len(train))].count(1) == 3
    assert train.image_size is None


def test_a_class_without_validation_images_shifts_no_label(image_folder: Path) -> None:
    write_images(image_folder / "train" / "c1")
    val = open_dataset("folder", "val", data_dir=image_folder)
    assert val.num_classes == 3
    assert {val[index][1] for index in range(len(val))} == {1, 2}


def test_a_validation_class_that_training_lacks_is_refused(image_folder: Path) -> None:
    write_images(image_folder / "val" / "c3")
    with pytest.raises(DataError, match="c3 is a class that"):
        open_dataset("folder", "val", data_dir=image_folder)


def test_missing_and_empty_folders_say_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"does not exist; expected DIR/train/CLASS/IMAGE"):
        open_dataset("folder", "train", data_dir=tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"has no 'train' folder; expected DIR/train/CLASS/IMAGE"):
        open_dataset("folder", "train", data_dir=tmp_path)
    (tmp_path / "train" / "cat").mkdir(parents=True)
    with pytest.raises(DataError, match=r"holds no images; expected DIR/train/CLASS/IMAGE"):
        open_dataset("folder", "train", data_dir=tmp_path)
    with pytest.raises(DataError, match="needs data_dir=DIR"):
        open_dataset("folder", "train")


def test_a_bad_image_is_named(image_folder: Path) -> None:
    bad = image_folder / "train" / "c2" / "1.png"
    bad.write_bytes(bad.read_bytes()[:45])  # cut in its pixels, behind a whole header
    train = open_dataset("folder", "train", data_dir=image_folder)
    broken = next(index for index in range(len(train)) if train.source(index) == str(bad))
    with pytest.raises(DataError, match=r"c2/1\.png cannot be read"):
        train[broken]


@pytest.mark.parametrize("name", ["torch/image_folder", "timm/any"])
def test_timm_opens_prefixed_names(image_folder: Path, name: str) -> None:
    dataset = open_dataset(name, "val", data_dir=image_folder)
    assert sorted(dataset.class_names) == ["c10", "c2"]
    image, label = dataset[0]
    assert image.mode == "RGB"
    assert dataset.class_names[label] in dataset.source(0)


def test_what_timm_cannot_open_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="timm cannot open data set 'torch/nothing'") as caught:
        open_dataset("torch/nothing", "val", data_dir=tmp_path)
    assert "\n" not in str(caught.value)


# -- registered ones --------------------------------------------------------------------------------------------------


class Squares(ImageDataset):
    """Two classes of one colour each."""

    def __init__(self, split: str) -> None:
        super().__init__(["dark", "light"], image_size=8)
        self.split = split

    def __len__(self) -> int:
        return 16 if self.split == "train" else 4

    def read(self, index: int) -> tuple[Image.Image, int]:
        return Image.new("RGB", (8, 8), (200 * (index % 2),) * 3), index % 2


def test_a_registered_data_set_is_opened_by_its_name_with_the_options_it_takes(tmp_path: Path) -> None:
    seen = []
    with DATASETS.restored():

        @register_dataset("squares")
        def open_squares(split: str, data_dir: Path | None) -> ImageDataset:
            seen.append(data_dir)
            return Squares(split)

        @register_dataset("sized")
        def open_sized(split: str, data_dir: Path | None, variant: str, seed: int) -> ImageDataset:
            seen.append((variant, seed))
            return Squares(split)

        assert len(open_dataset("squares", "train", data_dir=tmp_path)) == 16
        assert len(open_dataset("sized:x2", "val", seed=3)) == 4
        assert seen == [tmp_path, ("x2", 3)]
        with pytest.raises(DataError, match=r"unknown data set 'squares:2'; did you mean squares"):
            open_dataset("squares:2", "train")
        with pytest.raises(DataError, match="unknown data set 'square'; did you mean squares"):
            open_dataset("square", "train")
    with pytest.raises(DataError, match="unknown data set 'squares'"):
        open_dataset("squares", "train")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("digits", "there is a data set 'digits' already: register yours under another name"),
        ("my/own", "'my/own' cannot name a data set: expected letters, digits"),
        ("a:b", "'a:b' cannot name a data set"),
        ("", "'' cannot name a data set"),
    ],
)
def test_a_name_that_cannot_be_registered_is_refused(name: str, message: str) -> None:
    with DATASETS.restored(), pytest.raises(UserError, match=message):
        register_dataset(name)(lambda split, data_dir: Squares(split))


def test_a_function_without_split_and_folder_is_refused_when_it_is_registered() -> None:
    with DATASETS.restored(), pytest.raises(UserError, match="is called with split and data_dir"):
        register_dataset("squares")(lambda: Squares("train"))


def test_a_registered_data_set_that_needs_a_folder_says_so() -> None:
    with DATASETS.restored():
        register_dataset("squares", needs_dir=True)(lambda split, data_dir: Squares(split))
        with pytest.raises(DataError, match="data set 'squares' needs data_dir=DIR"):
            open_dataset("squares", "train")


@pytest.mark.parametrize(
    "name", ["synthetic:", "synthetic:3", "synthetic:3xa", "synthetic:3x8x9x9", "shapes:40x10x3", "digits:3"]
)
def test_a_variant_that_does_not_exist_is_unknown(name: str) -> None:
    with pytest.raises(DataError, match=f"unknown data set '{name}'"):
        open_dataset(name, "train")


def test_of_processes_that_fetch_into_one_folder_one_does_at_a_time(tmp_path: Path) -> None:
    inside, most = 0, 0

    def fetch() -> None:
        nonlocal inside, most
        with stored_datasets._one_download_at_a_time(tmp_path / "data", True):
            inside += 1
            most = max(most, inside)
            time.sleep(0.05)
            inside -= 1

    threads = [threading.Thread(target=fetch) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert most == 1


def test_data_that_were_fetched_and_are_damaged_say_what_to_remove(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(*args: object, **kwargs: object) -> None:
        raise RuntimeError("Dataset not found or corrupted.")

    monkeypatch.setattr(stored_datasets.CIFAR["cifar10"], "__init__", damaged)
    with pytest.raises(DataError, match=r"what was fetched is damaged: remove .*cifar-10-batches-py"):
        open_dataset("cifar10", "train", data_dir=tmp_path, download=True)
    with pytest.raises(DataError, match="set dataset_download=true"):
        open_dataset("cifar10", "train", data_dir=tmp_path)
