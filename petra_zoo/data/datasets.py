"""Opens a data set by name."""

import difflib
import re
from pathlib import Path

from petra_zoo.data.drawn_datasets import ShapesDataset, SyntheticDataset
from petra_zoo.data.image_dataset import DataError, ImageDataset, Split
from petra_zoo.data.image_folder import FolderDataset
from petra_zoo.data.stored_datasets import TimmDataset, open_cifar, open_digits, open_imagenet32
from petra_zoo.settings.types import BadImagePolicy

__all__ = ["DATASETS", "BadImagePolicy", "DataError", "ImageDataset", "Split", "open_dataset"]

DATASETS = ("digits", "shapes", "synthetic", "cifar10", "cifar100", "imagenet32", "folder")

_STREAMS = ("hfids/", "tfds/", "wds/")


def open_dataset(
    name: str,
    split: Split,
    *,
    data_dir: Path | None = None,
    seed: int = 0,
    download: bool = False,
    split_name: str | None = None,
    verify: bool = True,
) -> ImageDataset:
    """Opens one split of a data set.

    Args:
        name: One of `DATASETS`; `synthetic:CLASSESxSIZE` (`synthetic:1000x224`) for other numbers than 10x32; or a
            name with a `/` that `timm.data.create_dataset` knows (`torch/mnist`, `hfds/user/name`).
        split: Which part; `val` is the part models are compared on.
        data_dir: Where the files are. `digits`, `shapes` and `synthetic` need none.
        seed: What `shapes` and `synthetic` are drawn from. It belongs to the data, not to a run.
        download: Fetch missing files (CIFAR and timm's `torch/` names).
        split_name: What a timm data set calls this split; by default `train` or `validation`.
        verify: Compare CIFAR's files with their published checksums. They are pickles: False only for files that this
            program has written itself.

    Returns:
        The data set: RGB images and their labels, by index.

    Raises:
        DataError: The name is unknown, or the data is missing or not as expected.
    """
    if "/" in name:
        if name.lower().startswith(_STREAMS):
            # Augmentation and shuffling here are drawn by sample index, which a stream does not have.
            raise DataError(f"data set '{name}' is a stream without sample indices; use hfds/ or a folder instead")
        return TimmDataset(
            name, split_name or {"train": "train", "val": "validation"}[split], data_dir, download=download
        )
    if name == "digits":
        return open_digits(split)
    if name == "shapes":
        return ShapesDataset(split, seed)
    if match := re.fullmatch(r"synthetic(?::(\d+)x(\d+))?", name):
        classes, size = (int(number or default) for number, default in zip(match.groups(), (10, 32), strict=True))
        return SyntheticDataset(split, seed, num_classes=classes, image_size=size)
    if name not in DATASETS:
        near = difflib.get_close_matches(name, DATASETS, n=2) or DATASETS
        raise DataError(f"unknown data set '{name}'; did you mean {' or '.join(near)}?")
    if data_dir is None:
        raise DataError(f"data set '{name}' needs data_dir=DIR, the folder that holds it")
    if name == "imagenet32":
        return open_imagenet32(split, data_dir)
    if name == "folder":
        return FolderDataset(split, data_dir)
    return open_cifar(name, split, data_dir, download=download, verify=verify)
