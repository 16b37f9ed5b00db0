"""Class folders of image files: what counts as an image, what is passed over, and the data set that they make."""

import logging
import os
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile
from timm.utils.misc import natural_key

from petra_zoo.data.decoding import read_rgb
from petra_zoo.data.folder_split import VAL_FRACTION, validation_files
from petra_zoo.data.image_dataset import DataError, ImageDataset, Split

_VAL_FOLDERS = ("val", "validation", "valid", "test")
_LAYOUT = (
    "expected DIR/train/CLASS/IMAGE and DIR/val/CLASS/IMAGE (or validation, valid, test), or DIR/CLASS/IMAGE for two "
    "classes and more, which val_fraction splits"
)
_SPLITS = frozenset({"train", "training", *_VAL_FOLDERS, "testing", "eval", "evaluation"})

# What storage systems and archivers leave between a person's folders; most others begin with a dot.
_SYSTEM_FOLDERS = frozenset(
    name.lower()
    for name in (
        "@eaDir", "@tmp", "@Recycle", "@Recently-Snapshot", "#recycle", "#snapshot", "$RECYCLE.BIN", "__MACOSX",
        "__pycache__", "lost+found", "System Volume Information",
    )
)  # fmt: skip

_logger = logging.getLogger(__name__)


def image_endings() -> frozenset[str]:
    """Endings of the files that Pillow decodes here, such as ".jpg"; of plugins like pillow-heif's once registered.

    Formats that Pillow only recognises (stubs without a handler), films and printed pages are none.
    """
    Image.init()

    def decodes(kind: str) -> bool:
        kind = {"MPO": "JPEG"}.get(kind, kind)  # several pictures in one JPEG file, which the plugin for JPEG opens
        factory = Image.OPEN[kind][0] if kind in Image.OPEN else None
        stub = isinstance(factory, type) and issubclass(factory, ImageFile.StubImageFile)
        return factory is not None and not stub and Image.MIME.get(kind, "image/").startswith("image/")

    return frozenset(ending for ending, kind in Image.registered_extensions().items() if decodes(kind))


def class_folders(folder: Path) -> list[str]:
    """Names of the folders in `folder` in timm's order (natural sort), without hidden ones and a system's own."""
    return sorted((entry.name for entry in folder.iterdir() if entry.is_dir() and _counts(entry.name)), key=natural_key)


def find_images(folder: Path) -> tuple[list[str], Counter[str]]:
    """Files of images at any depth, in torchvision's order, and how many others there are of each ending.

    Hidden and system files and folders are passed over and not counted.
    """
    endings = image_endings()
    images: list[str] = []
    ignored: Counter[str] = Counter()
    for root, files in sorted(_walk(folder)):
        for name in sorted(files):
            ending = os.path.splitext(name)[1].lower()
            if ending in endings:
                images.append(os.path.join(root, name))
            else:
                ignored[ending or "no ending"] += 1
    return images, ignored


class FolderDataset(ImageDataset):
    """An image folder in ImageNet's layout; classes are numbered in timm's order (natural sort of folder names).

    The training folder gives the classes of both splits, so that a class without validation images shifts no label.
    Where there is none, or nothing in it, the validation folder gives its own.

    Folders of classes alone, without those of splits, are split here: see `validation_files`.

    Args:
        split: which part.
        data_dir: the folder.
        val_fraction: the share of a folder without splits that is for validation.
        seed: of that choice; it belongs to the data, not to a run.
        say_split: log what it comes to.
    """

    def __init__(
        self,
        split: Split,
        data_dir: Path,
        *,
        val_fraction: float = VAL_FRACTION,
        seed: int = 0,
        say_split: bool = True,
    ) -> None:
        whole = _is_unsplit(data_dir)
        folder = data_dir if whole else _split_folder(split, data_dir)
        train = data_dir / "train"
        own = class_folders(folder)
        names = _names((class_folders(train) if train.is_dir() else []) or own)
        if unknown := sorted(name for name in own if _composed(name) not in names):
            raise DataError(f"{folder / unknown[0]} is a class that {train} does not have; class folders must agree")
        numbers = {name: label for label, name in enumerate(names)}
        self._samples: list[tuple[str, int]] = []
        ignored: Counter[str] = Counter()
        empty = []
        for name in sorted(own):  # torchvision's order of samples, whatever the labels
            files, others = find_images(folder / name)
            self._samples += [(file, numbers[_composed(name)]) for file in files]
            ignored += others
            if not files:
                empty.append((name, others))
        if not self._samples:
            raise DataError(f"data folder {folder} holds no images{_other_files(ignored)}; {_LAYOUT}")
        if (split == "train" or whole) and empty:
            name, others = empty[0]
            raise DataError(f"class folder {folder / name} holds no image{_other_files(others)}: fill it, or remove it")
        if ignored and not (whole and split == "train"):  # of a whole folder both splits would say it
            others_are = "1 other file is" if ignored.total() == 1 else f"{ignored.total()} other files are"
            _logger.warning("%s: %s ignored (%s)", folder, others_are, _counted(ignored))
        super().__init__(names)
        if whole:
            self._keep_only(split, data_dir, val_fraction, seed, say=say_split and split == "val")

    def _keep_only(self, split: Split, root: Path, fraction: float, seed: int, *, say: bool) -> None:
        """Leaves of the whole folder's samples those of a split.

        Says it once, for the split to validate on: it is opened behind the other, or alone.
        """
        found = validation_files(self._samples, root, fraction=fraction, seed=seed)
        parts = {
            "train": [sample for sample in self._samples if sample[0] not in found],
            "val": [sample for sample in self._samples if sample[0] in found],
        }
        if not parts["val"]:
            raise DataError(f"{root}: no class has two images, one to train on and one to validate on: add images")
        missing = sorted(set(range(self.num_classes)) - {label for _, label in parts["val"]})
        self._samples = parts[split]
        if say:
            numbers = f"{len(parts['train'])} images to train on, {len(parts['val'])} to validate on"
            which = f"class {self.class_names[missing[0]]}" if len(missing) == 1 else f"{len(missing)} classes"
            gap = f", none of {which}" if missing else ""
            _logger.warning("%s has no splits: val_fraction=%g makes %s%s", root, fraction, numbers, gap)

    def __len__(self) -> int:
        return len(self._samples)

    def read(self, index: int) -> tuple[Image.Image, int]:
        file, label = self._samples[index]
        return read_rgb(file), label

    def stored_labels(self) -> npt.NDArray[np.integer]:
        return np.array([label for _, label in self._samples], dtype=np.int64)

    def source(self, index: int) -> str:
        return self._samples[index][0]


def _is_unsplit(data_dir: Path) -> bool:
    """Whether it holds folders of classes, and none that looks like a split's."""
    names = [name.lower() for name in class_folders(data_dir)] if data_dir.is_dir() else []
    return len(names) > 1 and not _SPLITS & set(names)


def _split_folder(split: Split, data_dir: Path) -> Path:
    if not data_dir.is_dir():
        raise DataError(f"data folder {data_dir} does not exist; {_LAYOUT}")
    candidates = ("train",) if split == "train" else _VAL_FOLDERS
    folder = next((data_dir / name for name in candidates if (data_dir / name).is_dir()), None)
    if folder is None:
        raise DataError(f"data folder {data_dir} has no '{candidates[0]}' folder; {_LAYOUT}")
    return folder


def _composed(name: str) -> str:
    """File systems and archives write accents in two ways, which look the same."""
    return unicodedata.normalize("NFC", name)


def _names(folders: list[str]) -> list[str]:
    return list(dict.fromkeys(_composed(name) for name in folders))


def _counts(name: str) -> bool:
    return not name.startswith(".") and name.lower() not in _SYSTEM_FOLDERS


def _walk(folder: Path) -> list[tuple[str, list[str]]]:
    found = []
    for root, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if _counts(name) and not _leads_back(root, name)]
        found.append((root, [name for name in files if _counts(name)]))
    return found


def _leads_back(root: str, name: str) -> bool:
    """Whether a folder is a link to one that it lies in: its images would be found again and again."""
    folder = Path(root, name)
    return folder.is_symlink() and Path(root).resolve().is_relative_to(folder.resolve())


def _counted(endings: Counter[str]) -> str:
    return ", ".join(f"{count} {ending}" for ending, count in endings.most_common(5))


def _other_files(endings: Counter[str]) -> str:
    return f" that Pillow decodes here, only other files ({_counted(endings)})" if endings else ""
