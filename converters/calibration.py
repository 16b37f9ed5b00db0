"""Images to calibrate and to compare on: given as tensors, or a random part of a data set, prepared for the network."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from petra_zoo.data.datasets import ImageDataset, Split, open_dataset
from petra_zoo.data.loader import ImageLoader, Reading, create_loader
from petra_zoo.data.preprocessing import Preprocessing
from petra_zoo.errors import UserError
from petra_zoo.settings.types import BadImagePolicy

BATCH_SIZE = 64


Batches = Tensor | Iterable[Tensor | Sequence[Tensor]]


def image_batches(images: Batches) -> Iterator[Tensor]:
    """Batches of images [B, C, H, W] from what people have at hand.

    Args:
        images: one tensor of images, or batches of them: tensors, or what loaders give, images first (then labels).

    Raises:
        UserError: something else.
    """
    if isinstance(images, Tensor):
        # In batches of about one size: each counts the same, and one left-over image would have no variance.
        images = images.chunk(-(-len(images) // BATCH_SIZE)) if images.ndim == 4 and len(images) else [images]
    for item in images:
        batch = item[0] if isinstance(item, list | tuple) and item else item
        if not isinstance(batch, Tensor) or batch.ndim != 4:
            found = f"a tensor of shape {list(batch.shape)}" if isinstance(batch, Tensor) else type(batch).__name__
            raise UserError(f"expected images [B, C, H, W], or batches of them, but got {found}")
        if len(batch):
            yield batch


class _Part(ImageDataset):
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


def open_images(
    model: Any,
    dataset: str,
    split: Split,
    count: int,
    data_dir: Path | None = None,
    on_bad_image: BadImagePolicy = "fail",
) -> ImageLoader:
    """Batches of `count` images (fewer where the split has fewer) and their labels, the same ones every time.

    Args:
        model: whose preprocessing (size, crop, interpolation, mean, std) is applied.
        dataset: a name that `open_dataset` knows.
        split: which part of it.
        count: how many images, at least 1.
        data_dir: where the data set's files are.
        on_bad_image: what to do about an unreadable image.

    Raises:
        DataError: the data is missing, or the name unknown.
    """
    data = _Part(open_dataset(dataset, split, data_dir=data_dir), count)
    preprocessing = Preprocessing.of(model)
    reading = Reading(on_bad_image=on_bad_image)
    return create_loader(data, preprocessing, batch_size=min(BATCH_SIZE, len(data)), reading=reading)
