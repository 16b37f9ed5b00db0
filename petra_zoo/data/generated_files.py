"""Small files of noise in a data set's own format: enough to try a recipe without the data set."""

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from petra_zoo.data.stored_datasets import CIFAR, IMAGENET32_TRAIN, IMAGENET32_VAL

_IMAGES = 8  # per file; an image folder has one per class to train on and this many to validate
_PHOTO = (72, 96)  # height and width; smaller than ImageNet's own, and no square either
_IMAGENET_CLASSES = 1000


def write_dataset(name: str, folder: Path, num_classes: int | None = None) -> bool:
    """Writes a small version of data set `name` as `open_dataset(name, ..., data_dir=folder)` reads it.

    Args:
        name: The data set.
        folder: An empty folder.
        num_classes: Classes of an image folder; None for ImageNet's 1,000.

    Returns:
        Whether there is such a format; False, and nothing written, for data that needs no files or is opened by timm.
    """
    writers: dict[str, Callable[[], None]] = {
        "cifar10": lambda: _write_cifar("cifar10", folder),
        "cifar100": lambda: _write_cifar("cifar100", folder),
        "imagenet32": lambda: _write_imagenet32(folder),
        "folder": lambda: _write_folder(folder, num_classes or _IMAGENET_CLASSES),
    }
    if name in writers:
        writers[name]()
    return name in writers


def _write_cifar(name: str, folder: Path) -> None:
    kind = CIFAR[name]
    names_key = kind.meta["key"]  # label_names, fine_label_names
    classes = {"cifar10": 10, "cifar100": 100}[name]
    batches = folder / kind.base_folder
    batches.mkdir()
    rng = np.random.default_rng(0)
    for file, _ in kind.train_list + kind.test_list:
        batch = {
            "data": rng.integers(0, 256, (_IMAGES, 3072), dtype=np.uint8),
            names_key.replace("label_names", "labels"): rng.integers(0, classes, _IMAGES).tolist(),
        }
        (batches / file).write_bytes(pickle.dumps(batch))
    meta = {names_key: [f"class {label}" for label in range(classes)]}
    (batches / kind.meta["filename"]).write_bytes(pickle.dumps(meta))


def _write_imagenet32(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for file in IMAGENET32_TRAIN + IMAGENET32_VAL:
        data = rng.integers(0, 256, (_IMAGES, 3072), dtype=np.uint8)
        np.savez(folder / file, data=data, labels=rng.integers(1, 1001, _IMAGES))


def _write_folder(folder: Path, num_classes: int) -> None:
    rng = np.random.default_rng(0)
    for split, count in (("train", num_classes), ("val", min(num_classes, _IMAGES))):
        for label in range(count):
            path = folder / split / f"class{label:04d}"
            path.mkdir(parents=True)
            Image.fromarray(rng.integers(0, 256, (*_PHOTO, 3), dtype=np.uint8)).save(path / "0.JPEG")
