"""Data sets by name: those of this package, timm's, and whatever else is registered."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from petra_zoo.data.drawn_datasets import ShapesDataset, SyntheticDataset
from petra_zoo.data.folder_split import VAL_FRACTION
from petra_zoo.data.image_dataset import DataError, ImageDataset, Split
from petra_zoo.data.image_folder import FolderDataset
from petra_zoo.data.stored_datasets import TimmDataset, open_cifar, open_digits, open_imagenet32
from petra_zoo.errors import UserError
from petra_zoo.registry import Registry
from petra_zoo.settings.types import BadImagePolicy

__all__ = ["DATASETS", "BadImagePolicy", "DataError", "ImageDataset", "Split", "open_dataset", "register_dataset"]

_STREAMS = ("hfids/", "tfds/", "wds/")
_OPTIONS = frozenset({"seed", "download", "split_name", "verify", "val_fraction", "say_split", "variant"})

Opener = TypeVar("Opener", bound=Callable[..., ImageDataset])


@dataclass(frozen=True)
class _Registered:
    open: Callable[..., ImageDataset]
    options: frozenset[str]  # those of `_OPTIONS` that the function takes
    needs_dir: bool


DATASETS: Registry[_Registered] = Registry("data set", "petra_zoo.datasets")


def register_dataset(name: str, *, needs_dir: bool = False) -> Callable[[Opener], Opener]:
    """Makes a data set known by name, to recipes and to every command that takes `--dataset`.

    What is decorated is called with the split, `'train'` or `'val'`, and the folder that `data_dir` names (None where
    it names none), and gives an `ImageDataset`. Of the options it gets those that it has parameters for: `seed`,
    `download`, `split_name`, `verify`, `val_fraction` and `say_split` (see `open_dataset`), and `variant`, the text
    behind a colon in the name.

    Args:
        name: of the data set.
        needs_dir: whether it cannot do without `data_dir`.

    Raises:
        UserError: there is one of that name.

    Example:
        >>> @register_dataset("squares")
        ... def open_squares(split, data_dir):
        ...     return SquaresDataset(split)
    """

    def register(opener: Opener) -> Opener:
        parameters = inspect.signature(opener).parameters
        if len(parameters) < 2:
            raise UserError(f"data set '{name}': its function is called with split and data_dir; it takes neither")
        DATASETS.add(name, _Registered(opener, _OPTIONS & parameters.keys(), needs_dir))
        return opener

    return register


def open_dataset(
    name: str,
    split: Split,
    *,
    data_dir: Path | None = None,
    seed: int = 0,
    download: bool = False,
    split_name: str | None = None,
    verify: bool = True,
    val_fraction: float = VAL_FRACTION,
    say_split: bool = True,
) -> ImageDataset:
    """Opens one split of a data set.

    Args:
        name: A registered name; `synthetic:CLASSESxSIZE` (`synthetic:1000x224`) for other numbers than 10x32, with
            `xIMAGES` for other than 1,024 images per split, or `shapes:TRAINxVAL` for other numbers of images than
            4000x1000; or a name with a `/` that `timm.data.create_dataset` knows (`torch/mnist`, `hfds/user/name`).
        split: Which part; `val` is the part models are compared on.
        data_dir: Where the files are. `digits`, `shapes` and `synthetic` need none.
        seed: What `shapes` and `synthetic` are drawn from, and a folder without splits is split by. It belongs to the
            data, not to a run.
        download: Fetch missing files (CIFAR and timm's `torch/` names).
        split_name: What a timm data set calls this split; by default `train` or `validation`.
        verify: Compare CIFAR's files with their published checksums. They are pickles: False only for files that this
            program has written itself.
        val_fraction: The share of a `folder` without splits that is for validation.
        say_split: Log that it has none and how it is split: not where it was said when a run began.

    Returns:
        The data set: RGB images and their labels, by index.

    Raises:
        DataError: The name is unknown, or the data is missing or not as expected.
    """
    if "/" in name:
        if data_dir is None and Path(name).is_dir():
            raise _unknown(name)
        return _open_timms(name, split_name or {"train": "train", "val": "validation"}[split], data_dir, download)
    kind, colon, variant = name.partition(":")
    known = DATASETS.get(kind)
    if known is None or (colon and not (variant and "variant" in known.options)):
        raise _unknown(name)
    if known.needs_dir and data_dir is None:
        raise DataError(f"data set '{name}' needs data_dir=DIR, the folder that holds it")
    options = {
        "seed": seed,
        "download": download,
        "split_name": split_name,
        "verify": verify,
        "val_fraction": val_fraction,
        "say_split": say_split,
        "variant": variant,
    }
    return known.open(split, data_dir, **{key: options[key] for key in known.options})


def _unknown(name: str) -> DataError:
    images = f"for the images in that folder say folder, with data_dir={name}" if Path(name).is_dir() else None
    return DataError(f"unknown data set '{name}'; {images or DATASETS.hint(name)}")


def _open_timms(name: str, split_name: str, data_dir: Path | None, download: bool) -> ImageDataset:
    if name.lower().startswith(_STREAMS):
        # Augmentation and shuffling here are drawn by sample index, which a stream does not have.
        raise DataError(f"data set '{name}' is a stream without sample indices; use hfds/ or a folder instead")
    return TimmDataset(name, split_name, data_dir, download=download)


@register_dataset("digits")
def _open_digits(split: Split, data_dir: Path | None) -> ImageDataset:
    return open_digits(split)


@register_dataset("shapes")
def _open_shapes(split: Split, data_dir: Path | None, seed: int, variant: str) -> ImageDataset:
    train, val = _numbers("shapes", variant or "4000x1000", 2)
    return ShapesDataset(split, seed, lengths=(train, val))


@register_dataset("synthetic")
def _open_synthetic(split: Split, data_dir: Path | None, seed: int, variant: str) -> ImageDataset:
    classes, size, *length = _numbers("synthetic", variant or "10x32", 2, 3)
    return SyntheticDataset(split, seed, num_classes=classes, image_size=size, length=length[0] if length else 1024)


def _numbers(name: str, variant: str, *counts: int) -> list[int]:
    """The numbers of `4000x1000`, as many as one of `counts`."""
    numbers = variant.split("x")
    if len(numbers) not in counts or not all(number.isdecimal() and int(number) for number in numbers):
        raise _unknown(f"{name}:{variant}")
    return [int(number) for number in numbers]


@register_dataset("cifar10", needs_dir=True)
def _open_cifar10(split: Split, data_dir: Path, download: bool, verify: bool) -> ImageDataset:
    return open_cifar("cifar10", split, data_dir, download=download, verify=verify)


@register_dataset("cifar100", needs_dir=True)
def _open_cifar100(split: Split, data_dir: Path, download: bool, verify: bool) -> ImageDataset:
    return open_cifar("cifar100", split, data_dir, download=download, verify=verify)


@register_dataset("imagenet32", needs_dir=True)
def _open_imagenet32(split: Split, data_dir: Path) -> ImageDataset:
    return open_imagenet32(split, data_dir)


@register_dataset("folder", needs_dir=True)
def _open_folder(split: Split, data_dir: Path, val_fraction: float, seed: int, say_split: bool) -> ImageDataset:
    return FolderDataset(split, data_dir, val_fraction=val_fraction, seed=seed, say_split=say_split)
