"""What a data set is made of, found by reading all of it: before anything is trained on it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Generator
from torch.utils.data import DataLoader, Dataset

from petra_zoo.data.balance import class_counts
from petra_zoo.data.image_dataset import BadImage, ImageDataset, Split, fingerprint
from petra_zoo.data.loader import many_readers
from petra_zoo.progress import tracked
from petra_zoo.strict_json import JsonObject

_AT_ONCE = 32  # images between two steps of the progress bar

Channels = npt.NDArray[np.float64]  # [3]


class Copy(NamedTuple):
    """One of several images with the same pixels."""

    split: Split
    source: str
    class_name: str


@dataclass(frozen=True)
class SplitSurvey:
    """One split of a data set.

    Attributes:
        images: how many there are.
        looked_at: how many of them were read; all that follows but `per_class` is of these.
        per_class: images of each class, by its name.
        sizes: how many images there are of each width and height, upright.
        formats: how many files of each format and mode, as Pillow calls them; empty where images are no files.
        unreadable: the images that cannot be decoded.
        mean, std: of pixels in 0..1, per RGB channel, every image counting the same; nan where none can be read.
    """

    split: Split
    images: int
    looked_at: int
    per_class: dict[str, int]
    sizes: Counter[tuple[int, int]]
    formats: Counter[str]
    unreadable: list[BadImage]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def imbalance(self) -> float:
        """How many times as many images the largest class has as the smallest that has any."""
        counts = [count for count in self.per_class.values() if count]
        return max(counts) / min(counts) if counts else 1.0

    def median_size(self) -> tuple[int, int]:
        """Width and height, each on its own; 0 where no image can be read."""
        sizes = np.array(list(self.sizes.elements()) or [(0, 0)])
        width, height = np.median(sizes, axis=0).astype(int).tolist()
        return width, height

    def as_dict(self) -> JsonObject:
        """For JSON."""
        by_number = self.sizes.most_common()
        return {
            "split": self.split,
            "images": self.images,
            "looked_at": self.looked_at,
            "per_class": self.per_class,
            "imbalance": self.imbalance,
            "sizes": [{"width": width, "height": height, "images": n} for (width, height), n in by_number],
            "formats": dict(self.formats.most_common()),
            "unreadable": [{"source": bad.source, "reason": bad.reason} for bad in self.unreadable],
            "mean": list(self.mean),
            "std": list(self.std),
        }


@dataclass(frozen=True)
class Survey:
    """A data set.

    Attributes:
        splits: each on its own.
        copies: groups of images with the same pixels, in one split or several.
    """

    dataset: str
    splits: list[SplitSurvey]
    copies: list[list[Copy]]

    @property
    def unreadable(self) -> int:
        """How many images cannot be read."""
        return sum(len(split.unreadable) for split in self.splits)

    @property
    def across(self) -> list[list[Copy]]:
        """The copies of which some are trained on and some validated on."""
        return [group for group in self.copies if len({copy.split for copy in group}) > 1]

    @property
    def contradicting(self) -> list[list[Copy]]:
        """The copies that are in several classes."""
        return [group for group in self.copies if len({copy.class_name for copy in group}) > 1]

    @property
    def harmless(self) -> list[list[Copy]]:
        """The copies that are in one split and one class: they count more than others, and no more."""
        return [group for group in self.copies if len({(copy.split, copy.class_name) for copy in group}) == 1]

    def as_dict(self) -> JsonObject:
        """For JSON."""
        copies = [[copy._asdict() for copy in group] for group in self.copies]
        return {"dataset": self.dataset, "splits": [split.as_dict() for split in self.splits], "copies": copies}


def survey(
    name: str, splits: Sequence[tuple[Split, ImageDataset]], *, most: int | None = None, workers: int = 0
) -> Survey:
    """Reads every image once.

    Args:
        name: of the data set.
        splits: what it consists of.
        most: read no more of a split than so many, evenly spread; None: all.
        workers: processes that read; 0: this one.
    """
    found: list[SplitSurvey] = []
    same: defaultdict[bytes, list[Copy]] = defaultdict(list)
    for split, data in splits:
        labels = data.labels()
        sums = _Sums()
        for index, fact in _read(data, most, workers, f"reading {split}"):
            sums.add(fact)
            if isinstance(fact, _Fact):
                same[fact.fingerprint].append(Copy(split, data.source(index), data.class_names[labels[index]]))
        counts = class_counts(labels, data.num_classes).tolist()
        found.append(sums.survey(split, len(data), dict(zip(data.class_names, counts, strict=True))))
    return Survey(name, found, [group for group in same.values() if len(group) > 1])


class _Fact(NamedTuple):
    """An image that was read."""

    size: tuple[int, int]
    format: str | None
    fingerprint: bytes
    mean: Channels
    mean_square: Channels


class _Facts(Dataset[tuple[int, _Fact | BadImage]]):
    """Facts in the place of images, so that worker processes send little."""

    def __init__(self, data: ImageDataset, indices: Sequence[int]) -> None:
        self._data, self._indices = data, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, place: int) -> tuple[int, _Fact | BadImage]:
        index = self._indices[place]
        found = self._data.try_load(index)
        if isinstance(found, BadImage):
            return index, found
        image, _ = found
        pixels = np.asarray(image, dtype=np.float64).reshape(-1, 3) / 255
        mean, square = pixels.mean(0), np.square(pixels).mean(0)
        return index, _Fact(image.size, _format_of(self._data.source(index)), fingerprint(image), mean, square)


class _Sums:
    """What the facts of a split come to."""

    def __init__(self) -> None:
        self.sizes: Counter[tuple[int, int]] = Counter()
        self.formats: Counter[str] = Counter()
        self.unreadable: list[BadImage] = []
        self.mean, self.square = np.zeros(3), np.zeros(3)

    def add(self, fact: _Fact | BadImage) -> None:
        if isinstance(fact, BadImage):
            self.unreadable.append(fact)
            return
        self.sizes[fact.size] += 1
        if fact.format:
            self.formats[fact.format] += 1
        self.mean += fact.mean
        self.square += fact.mean_square

    def survey(self, split: Split, images: int, per_class: dict[str, int]) -> SplitSurvey:
        read = self.sizes.total()
        mean, square = (total / read if read else np.full(3, np.nan) for total in (self.mean, self.square))
        std = np.sqrt(np.maximum(square - np.square(mean), 0.0))
        return SplitSurvey(
            split=split,
            images=images,
            looked_at=read + len(self.unreadable),
            per_class=per_class,
            sizes=self.sizes,
            formats=self.formats,
            unreadable=self.unreadable,
            mean=tuple(mean.tolist()),
            std=tuple(std.tolist()),
        )


def _read(data: ImageDataset, most: int | None, workers: int, what: str) -> Iterator[tuple[int, _Fact | BadImage]]:
    indices = np.unique(np.linspace(0, len(data) - 1, min(len(data), most or len(data))).round().astype(int)).tolist()
    with many_readers():
        batches = DataLoader(
            _Facts(data, indices), batch_size=_AT_ONCE, num_workers=workers, collate_fn=list, generator=Generator()
        )
        read = iter(batches)
    for batch in tracked(read, what, len(batches)):
        yield from batch


def _format_of(source: str) -> str | None:
    """Of a file; its content decides, whatever its name says."""
    if not Path(source).is_file():
        return None
    with Image.open(source) as image:
        return f"{image.format} {image.mode}"
