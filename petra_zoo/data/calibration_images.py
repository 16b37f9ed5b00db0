"""A random part of a data set, prepared for a network: to calibrate and to compare on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from torch import nn

from petra_zoo.data.datasets import open_dataset
from petra_zoo.data.image_dataset import ImageDataset, Split
from petra_zoo.data.loader import ImageLoader, Reading, create_loader
from petra_zoo.data.preprocessing import Preprocessing
from petra_zoo.settings.types import BadImagePolicy

BATCH_SIZE = 64


@dataclass(frozen=True)
class CalibrationImages:
    """A random part of a data set.

    Attributes:
        dataset: a name that `open_dataset` knows.
        data_dir: where the data set's files are.
        count: how many images, at least 1; fewer where a split has fewer.
        on_bad_image: what to do about an unreadable image.
    """

    dataset: str
    data_dir: Path | None = None
    count: int = 1024
    on_bad_image: BadImagePolicy = "fail"


class RandomPart(ImageDataset):
    """Some images of a data set, drawn without replacement: an image folder's first ones are all of one class."""

    def __init__(self, data: ImageDataset, count: int) -> None:
        super().__init__(data.class_names, image_size=data.image_size, mean=data.mean, std=data.std)
        self._data = data
        self._indices = np.random.default_rng(0).permutation(len(data))[:count].tolist()

    def __len__(self) -> int:
        return len(self._indices)

    def read(self, index: int) -> tuple[Image.Image, int]:
        return self._data.read(self._indices[index])

    def source(self, index: int) -> str:
        return self._data.source(self._indices[index])


def open_images(model: nn.Module, images: CalibrationImages, split: Split) -> ImageLoader:
    """Batches of some images of a split and their labels, the same ones every time.

    Args:
        model: whose preprocessing (size, crop, interpolation, mean, std) is applied.
        images: of which data set, and how many.
        split: which part of it.

    Raises:
        DataError: the data is missing, or the name unknown.
    """
    data = RandomPart(open_dataset(images.dataset, split, data_dir=images.data_dir), images.count)
    batch_size = min(BATCH_SIZE, len(data))
    reading = Reading(on_bad_image=images.on_bad_image)
    return create_loader(data, Preprocessing.of(model), batch_size=batch_size, reading=reading)
