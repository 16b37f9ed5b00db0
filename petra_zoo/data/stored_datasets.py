"""Data sets that lie on disk or come with a package: digits, CIFAR, ImageNet-32, and timm's own."""

import math
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, BinaryIO, Protocol

import numpy as np
import numpy.typing as npt
from filelock import FileLock
from PIL import Image
from timm.data.dataset_factory import create_dataset
from timm.data.readers import set_img_extensions
from torchvision.datasets import CIFAR10, CIFAR100

from petra_zoo.data.decoding import read_rgb
from petra_zoo.data.image_dataset import DataError, ImageDataset, Split
from petra_zoo.data.image_folder import image_endings

CIFAR = {"cifar10": CIFAR10, "cifar100": CIFAR100}
IMAGENET32_TRAIN = [f"train_data_batch_{number}.npz" for number in range(1, 11)]
IMAGENET32_VAL = ["val_data.npz"]
_LARGEST_ARRAY = 4 << 30  # bytes; all of ImageNet-32 in one file has fewer


class ArrayDataset(ImageDataset):
    """Images held in memory: uint8 [N, H, W, 3] or grey [N, H, W], and labels [N]."""

    def __init__(
        self,
        images: npt.NDArray[np.uint8],
        labels: npt.NDArray[np.integer],
        class_names: Sequence[str],
        *,
        named: bool = True,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
    ) -> None:
        super().__init__(class_names, named=named, image_size=images.shape[1], mean=mean, std=std)
        self._images = images
        self._labels = labels
        self.check_labels(labels)

    def __len__(self) -> int:
        return len(self._images)

    def read(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self._images[index]), int(self._labels[index])

    def stored_labels(self) -> npt.NDArray[np.integer]:
        return self._labels


def open_digits(split: Split) -> ArrayDataset:
    """Opens scikit-learn's handwritten digits: 1,797 real images of 8x8, split 80/20 by class."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise DataError("data set 'digits' needs scikit-learn: pip install 'petra-zoo[demo]'") from error
    digits = load_digits()
    # The split is part of the data set, so its seed is fixed: runs with different seeds share their validation images.
    chosen = train_test_split(np.arange(len(digits.target)), test_size=0.2, stratify=digits.target, random_state=0)
    index = np.sort(chosen[0 if split == "train" else 1])
    images = np.round(digits.images[index] * (255 / 16)).astype(np.uint8)
    names = [str(name) for name in digits.target_names]
    return ArrayDataset(images, digits.target[index], names, mean=(0.305,) * 3, std=(0.376,) * 3)


@contextmanager
def _one_download_at_a_time(data_dir: Path | None, download: bool) -> Iterator[None]:
    """Inside, of all processes that fetch into a folder one does, and the others find what it has fetched."""
    lock = FileLock(data_dir / ".download.lock") if download and data_dir else None
    if lock and data_dir:
        try:
            data_dir.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except OSError:  # not writable: nothing is fetched there, and what is there may do
            lock = None
    try:
        yield
    finally:
        if lock:
            lock.release()


def open_cifar(name: str, split: Split, data_dir: Path, *, download: bool, verify: bool = True) -> ArrayDataset:
    """Opens CIFAR-10 or CIFAR-100 from the folder torchvision keeps it in; `val` is the official test set."""
    kind = CIFAR[name] if verify else _without_checksums(CIFAR[name])
    try:
        with _one_download_at_a_time(data_dir, download):
            source = kind(data_dir, train=split == "train", download=download)
    except RuntimeError as error:  # torchvision says so when a file is missing or its checksum is wrong
        folder = data_dir / kind.base_folder
        fix = f"what was fetched is damaged: remove {folder}" if download else "set dataset_download=true"
        raise DataError(f"no complete {name} in {data_dir} (expected {folder}); {fix}") from error
    mean, std = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
    if name == "cifar100":
        mean, std = ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))
    return ArrayDataset(source.data, np.array(source.targets), source.classes, mean=mean, std=std)


def _without_checksums(kind: type[CIFAR10]) -> type[CIFAR10]:
    lists = {key: [[file, None] for file, _ in getattr(kind, key)] for key in ("train_list", "test_list")}
    return type(kind.__name__, (kind,), {**lists, "meta": {**kind.meta, "md5": None}})


def open_imagenet32(split: Split, data_dir: Path) -> ArrayDataset:
    """Opens the npz batches of down-sampled ImageNet: keys data [N, 3072] uint8 and labels 1..1000."""
    files = IMAGENET32_VAL if split == "val" else IMAGENET32_TRAIN
    images, labels = [], []
    for file in (data_dir / name for name in files):
        try:
            data, numbers = _read_batch(file)
        except FileNotFoundError as error:
            raise DataError(f"{file} is missing; imagenet32 expects {files[0]}..{files[-1]} in data_dir") from error
        except Exception as error:  # whatever numpy, zipfile and zlib make of a stranger's file
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise DataError(f"{file}: expected arrays data [N, 3072] and labels [N], found none ({reason})") from error
        images.append(data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        labels.append(numbers - 1)
    return ArrayDataset(
        np.concatenate(images),
        np.concatenate(labels),
        [f"class {label}" for label in range(1, 1001)],
        named=False,  # its labels are not in the order of ImageNet's synsets
        mean=(0.4811, 0.4575, 0.4079),
        std=(0.2604, 0.2532, 0.2682),
    )


def _read_batch(file: Path) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.integer]]:
    """A batch's images [N, 3072] and labels [N]; nothing is read that is larger than any batch."""
    with zipfile.ZipFile(file) as packed:
        for entry in packed.infolist():
            if entry.file_size > _LARGEST_ARRAY:
                raise ValueError(f"{entry.filename} has {entry.file_size:,} bytes")
            with packed.open(entry) as stream:  # numpy would make room for what a header claims
                _check_claim(stream, entry.file_size)
    with np.load(file, allow_pickle=False) as batch:
        data, labels = batch["data"], np.asarray(batch["labels"])
    if data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3072:
        raise ValueError(f"data is {data.dtype} {list(data.shape)}")
    if not np.issubdtype(labels.dtype, np.integer) or labels.shape != (len(data),):
        raise ValueError(f"labels is {labels.dtype} {list(labels.shape)} for {len(data)} images")
    return data, labels.astype(np.int64)


def _check_claim(stream: IO[bytes], size: int) -> None:
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(stream)
    if math.prod(shape) * dtype.itemsize > size:
        raise ValueError(f"an array claims to be {list(shape)}, more than there is")


class _Reader(Protocol):
    """What timm's data sets decode behind: files and labels by index."""

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]: ...

    def filename(self, index: int, *, absolute: bool) -> str: ...


class TimmDataset(ImageDataset):
    """A data set timm opens by a prefixed name, such as `torch/mnist` or `hfds/user/name`."""

    def __init__(self, name: str, split_name: str, data_dir: Path | None, *, download: bool) -> None:
        set_img_extensions(sorted(image_endings()))  # else its folders lose what is neither PNG nor JPEG without a word
        try:
            root = None if data_dir is None else str(data_dir)
            with _one_download_at_a_time(data_dir, download):
                source = create_dataset(name, root=root, split=split_name, download=download)
        except Exception as error:  # whatever timm, torchvision, datasets or the network raises
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DataError(f"timm cannot open data set '{name}', split '{split_name}': {reason}") from error
        # timm's data sets decode behind a reader that numbers the classes; torchvision's number them themselves. The
        # reader is used directly because timm's own __getitem__ replaces bad images silently.
        self._reader: _Reader | None = getattr(source, "reader", None)
        self._source = source
        numbers = getattr(self._reader or source, "class_to_idx", None)
        if not numbers:
            raise DataError(f"data set '{name}' does not name its classes; expected a classification data set")
        if hasattr(source, "loader"):  # torchvision's image folders
            source.loader = read_rgb
        super().__init__(sorted(numbers, key=numbers.__getitem__))

    def __len__(self) -> int:
        return len(self._source)

    def read(self, index: int) -> tuple[Image.Image, int]:
        if self._reader is None:
            return self._source[index]
        stream, label = self._reader[index]
        with stream:
            return read_rgb(stream), label

    def stored_labels(self) -> npt.NDArray[np.integer] | None:
        samples = getattr(self._reader or self._source, "samples", None)  # of image folders: files and labels
        if samples is not None and all(len(sample) == 2 for sample in samples):
            return np.array([label for _, label in samples], dtype=np.int64)
        targets = getattr(self._source, "targets", None)  # torchvision's own data sets
        return None if targets is None else np.asarray(targets, dtype=np.int64)

    def source(self, index: int) -> str:
        if self._reader is not None:
            return str(self._reader.filename(index, absolute=True))
        files = getattr(self._source, "samples", None)
        return str(files[index][0]) if files else super().source(index)
