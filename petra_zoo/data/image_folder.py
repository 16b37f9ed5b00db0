"""Class folders of image files: what counts as an image, what is passed over, and the data set that they make."""

import logging
import os
import unicodedata
from collections import Counter
from pathlib import Path

from PIL import Image, ImageFile
from timm.utils.misc import natural_key

from petra_zoo.data.decoding import read_rgb
from petra_zoo.data.image_dataset import DataError, ImageDataset, Split

_VAL_FOLDERS = ("val", "validation", "valid", "test")
_LAYOUT = "expected DIR/train/CLASS/IMAGE and DIR/val/CLASS/IMAGE (or validation, valid, test)"

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
    """

    def __init__(self, split: Split, data_dir: Path) -> None:
        folder = _split_folder(split, data_dir)
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
        if split == "train" and empty:
            name, others = empty[0]
            raise DataError(f"class folder {folder / name} holds no image{_other_files(others)}: fill it, or remove it")
        if ignored:
            _logger.warning("%s: %d other files are ignored (%s)", folder, ignored.total(), _counted(ignored))
        super().__init__(names)

    def __len__(self) -> int:
        return len(self._samples)

    def read(self, index: int) -> tuple[Image.Image, int]:
        file, label = self._samples[index]
        return read_rgb(file), label

    def source(self, index: int) -> str:
        return self._samples[index][0]


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
