"""The loader: the same samples whatever the workers, reproducible order, bad images counted, nothing left behind."""

import gc
import logging
import multiprocessing
import random
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from petra_zoo.data.datasets import DataError, ImageDataset, open_dataset
from petra_zoo.data.loader import LEFT_OUT, ImageLoader, Reading, create_loader
from petra_zoo.data.preprocessing import Preprocessing
from petra_zoo.errors import UserError
from petra_zoo.petra import World
from petra_zoo.settings.augmentation import Augmentation
from petra_zoo.settings.recipe_files import make_recipe
from petra_zoo.training.build import build_loaders, open_data

HEAVY = Augmentation(aa="rand-m9-mstd0.5", reprob=0.5, remode="pixel", hflip=0.5)


class FewSamples(ImageDataset):
    """The first images of another data set, so that tests stay short."""

    def __init__(self, source: ImageDataset, length: int) -> None:
        super().__init__(source.class_names, image_size=source.image_size, mean=source.mean, std=source.std)
        self._source, self._length = source, length

    def __len__(self) -> int:
        return self._length

    def read(self, index: int) -> tuple[Image.Image, int]:
        return self._source.read(index)


def make_loader(
    length: int = 20, *, batch_size: int = 8, train: bool = True, augmentation: Augmentation = HEAVY, seed: int = 1,
    workers: int = 0, drop_last: bool = False, size: int = 32, channels: int = 3,
) -> ImageLoader:  # fmt: skip
    dataset = FewSamples(open_dataset("shapes", "train"), length)
    half = (0.5,) * channels
    return create_loader(
        dataset, Preprocessing((channels, size, size), half, half, crop_pct=1.0 if size == 32 else 0.875),
        batch_size=batch_size, augmentation=augmentation if train else None, seed=seed, drop_last=drop_last,
        reading=Reading(workers=workers),
    )  # fmt: skip


def epoch_of(loader: ImageLoader, epoch: int) -> list[tuple[Tensor, Tensor]]:
    loader.set_epoch(epoch)
    return list(loader)


def assert_same(first: list[tuple[Tensor, Tensor]], second: list[tuple[Tensor, Tensor]]) -> None:
    assert len(first) == len(second)
    for (images, labels), (other_images, other_labels) in zip(first, second, strict=True):
        assert torch.equal(images, other_images)
        assert torch.equal(labels, other_labels)


def test_batches_have_the_promised_types_and_shapes() -> None:
    batches = list(make_loader())
    assert [tuple(images.shape) for images, _ in batches] == [(8, 3, 32, 32), (8, 3, 32, 32), (4, 3, 32, 32)]
    assert batches[0][0].dtype == torch.float32
    assert batches[0][1].dtype == torch.int64


def test_more_workers_than_cores_bring_no_warning_of_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0}, raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(list(make_loader(8, workers=2))) == 1


def test_workers_change_nothing_in_any_epoch_and_leave_no_process() -> None:
    alone, helped = make_loader(), make_loader(workers=2)
    for epoch in (0, 1, 5):
        assert_same(epoch_of(alone, epoch), epoch_of(helped, epoch))
    del helped
    gc.collect()
    assert not multiprocessing.active_children()


def test_a_sample_and_the_order_depend_on_epoch_and_seed() -> None:
    loader = make_loader()
    first = epoch_of(loader, 0)
    assert_same(first, epoch_of(loader, 0))
    assert not torch.equal(first[0][1], epoch_of(loader, 1)[0][1])
    assert not torch.equal(first[0][1], epoch_of(make_loader(seed=2), 0)[0][1])


def test_a_sample_does_not_depend_on_its_batch() -> None:
    by_eight = torch.cat([images for images, _ in make_loader(batch_size=8)])
    by_five = torch.cat([images for images, _ in make_loader(batch_size=5)])
    assert torch.equal(by_eight, by_five)


def test_validation_goes_in_order_without_augmentation() -> None:
    loader = make_loader(train=False)
    labels = torch.cat([labels for _, labels in loader])
    assert labels.tolist() == [index % 10 for index in range(20)]
    assert_same(epoch_of(loader, 0), epoch_of(loader, 1))


@pytest.mark.parametrize("workers", [0, 2])
def test_global_generators_are_undisturbed(workers: int) -> None:
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = random.random(), np.random.rand(), torch.rand(1).item()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    mixing = HEAVY.model_copy(update={"mixup": 0.2})
    list(make_loader(workers=workers, augmentation=mixing))
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected


def test_iteration_can_start_at_any_batch() -> None:
    augmentation = HEAVY.model_copy(update={"cutmix": 1.0, "smoothing": 0.1})
    loader = make_loader(augmentation=augmentation)
    assert_same(list(loader)[1:], list(loader.iter_from(1)))
    assert len(list(loader)) == len(loader) == 3


def test_starting_late_reads_no_earlier_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    original = FewSamples.read
    monkeypatch.setattr(FewSamples, "read", lambda self, index: (read.append(index), original(self, index))[1])
    list(make_loader(train=False).iter_from(2))
    assert read == [16, 17, 18, 19]


def test_an_abandoned_epoch_does_not_leak_into_the_next() -> None:
    loader = make_loader(workers=2, batch_size=2)
    next(iter(loader))
    assert_same(epoch_of(loader, 3), epoch_of(make_loader(batch_size=2), 3))


def test_native_resolution_is_kept_where_sizes_agree() -> None:
    digits = open_dataset("digits", "val")
    loader = create_loader(digits, Preprocessing((3, 8, 8), (0.0,) * 3, (1.0,) * 3, crop_pct=1.0), batch_size=4)
    images, _ = next(iter(loader))
    expected = torch.from_numpy(np.asarray(digits[0][0]).copy()).permute(2, 0, 1) / 255
    assert torch.equal(images[0], expected)


def test_pad_crop_shifts_by_at_most_the_padding() -> None:
    pad = Augmentation(train_crop_mode="pad", crop_padding=1, hflip=0.0)
    digits = open_dataset("digits", "train")
    loader = create_loader(digits, Preprocessing((3, 8, 8), (0.0,) * 3, (1.0,) * 3), batch_size=1, augmentation=pad)
    image, _ = next(iter(loader))
    everything = torch.stack([torch.from_numpy(np.asarray(digits[i][0]).copy()) for i in range(len(digits))])
    padded = torch.nn.functional.pad(everything.permute(0, 3, 1, 2) / 255, (1, 1, 1, 1))
    crops = [padded[:, :, top : top + 8, left : left + 8] for top in range(3) for left in range(3)]
    assert any((crop == image).flatten(1).all(1).any() for crop in crops)


def test_one_channel_input_is_grey() -> None:
    images, _ = next(iter(make_loader(channels=1)))
    assert images.shape == (8, 1, 32, 32)


def test_other_sizes_are_resized() -> None:
    images, _ = next(iter(make_loader(size=48, train=False)))
    assert images.shape == (8, 3, 48, 48)


def test_mean_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(UserError, match="expected 1 or 3 channels and one value for each"):
        create_loader(open_dataset("digits", "val"), Preprocessing((1, 8, 8), (0, 0, 0), (1, 1, 1)), batch_size=4)


def test_smoothing_gives_soft_labels_only_in_training() -> None:
    smooth = Augmentation(smoothing=0.1)
    _, soft = next(iter(make_loader(augmentation=smooth)))
    torch.testing.assert_close(soft.sum(1), torch.ones(8))
    torch.testing.assert_close(soft.max(1).values, torch.full((8,), 0.91))
    _, hard = next(iter(make_loader(augmentation=smooth, train=False)))
    assert hard.dtype == torch.int64


def test_mixup_of_an_odd_batch_leaves_its_last_image() -> None:
    plain = next(iter(make_loader(length=5, augmentation=Augmentation())))
    mixed = next(iter(make_loader(length=5, augmentation=Augmentation(mixup=1.0))))
    assert torch.equal(plain[0][4], mixed[0][4])
    assert not torch.equal(plain[0][0], mixed[0][0])
    assert mixed[1][4].tolist() == torch.nn.functional.one_hot(plain[1][4], 10).tolist()


def test_drop_last_and_length_agree() -> None:
    loader = make_loader(drop_last=True)
    assert len(loader) == len(list(loader)) == 2
    with pytest.raises(UserError, match="batch_size=64 is more than the 20 images"):
        make_loader(batch_size=64, drop_last=True)


@pytest.fixture
def damaged(tmp_path: Path) -> ImageDataset:
    """Eight images of one class each way; the third cannot be decoded."""
    for number in range(8):
        folder = tmp_path / "train" / ("even", "odd")[number // 4]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (30 * number, 0, 0)).save(folder / f"{number}.png")
    (tmp_path / "train" / "even" / "2.png").write_bytes(b"not an image")
    return open_dataset("folder", "train", data_dir=tmp_path)


def load_damaged(dataset: ImageDataset, workers: int, policy: str, leave_out: bool = False) -> ImageLoader:
    return create_loader(
        dataset, Preprocessing((3, 16, 16), (0.0,) * 3, (1.0,) * 3, crop_pct=1.0), batch_size=4,
        reading=Reading(workers=workers, on_bad_image=policy, leave_out=leave_out),
    )  # fmt: skip


@pytest.mark.parametrize("workers", [0, 2])
def test_a_skipped_image_is_replaced_named_once_and_counted(
    damaged: ImageDataset, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    loader = load_damaged(damaged, workers, "skip")
    with caplog.at_level(logging.WARNING):
        for epoch in range(2):
            images = torch.cat([images for images, _ in epoch_of(loader, epoch)])
    assert len(images) == 8
    assert torch.equal(images[2], images[3])
    assert list(damaged.bad_images) == [2]
    assert damaged.bad_images[2].source.endswith("2.png")
    assert [record.message.count("2.png cannot be read") for record in caplog.records] == [1]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_left_out_is_a_blank_without_label_in_a_batch_of_the_same_size(
    damaged: ImageDataset, workers: int
) -> None:
    batches = list(load_damaged(damaged, workers, "skip", leave_out=True))
    assert torch.cat([labels for _, labels in batches]).tolist() == [0, 0, LEFT_OUT, 0, 1, 1, 1, 1]
    images = torch.cat([images for images, _ in batches])
    assert not images[2].any()
    assert not torch.equal(images[2], images[3])
    assert list(damaged.bad_images) == [2]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_fails_in_one_line_that_names_it(damaged: ImageDataset, workers: int) -> None:
    with pytest.raises(DataError, match=r"2\.png cannot be read .*on_bad_image=skip") as caught:
        list(load_damaged(damaged, workers, "fail"))
    assert "\n" not in str(caught.value)
    del caught  # it holds this frame, which holds it: the workers would wait for the garbage collector


def test_nothing_readable_is_an_error_even_when_skipping(tmp_path: Path) -> None:
    folder = tmp_path / "train" / "only"
    folder.mkdir(parents=True)
    (folder / "a.png").write_bytes(b"")
    dataset = open_dataset("folder", "train", data_dir=tmp_path)
    for leave_out in (False, True):
        with pytest.raises(DataError, match="none of the 1 images can be read"):
            list(load_damaged(dataset, 0, "skip", leave_out))


def test_a_runs_validation_leaves_bad_images_out_and_its_training_replaces_them(tmp_path: Path) -> None:
    for split in ("train", "val"):
        folder = tmp_path / split / "only"
        folder.mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (8, 8), (30 * number, 0, 0)).save(folder / f"{number}.png")
        (folder / "2.png").write_bytes(b"not an image")
    settings = {"model": "petra_revnet_tiny", "dataset": "folder", "data_dir": str(tmp_path), "img_size": 8}
    recipe = make_recipe({**settings, "batch_size": 4, "workers": 0, "on_bad_image": "skip"})
    config = Preprocessing((3, 8, 8), (0.0,) * 3, (1.0,) * 3)
    train, val = build_loaders(recipe, *open_data(recipe), config, World(device=torch.device("cpu")))
    assert next(iter(train))[1].tolist() == [0, 0, 0, 0]
    assert next(iter(val))[1].tolist() == [0, 0, LEFT_OUT, 0]
