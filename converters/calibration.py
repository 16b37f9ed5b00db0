"""Images to calibrate, measure and compare on: tensors at hand, noise, or a random part of a data set, prepared."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from petra_zoo.data.datasets import ImageDataset, Split, open_dataset
from petra_zoo.data.loader import ImageLoader, Reading, create_loader
from petra_zoo.data.preprocessing import Preprocessing
from petra_zoo.errors import UserError
from petra_zoo.models.classifier import config_of
from petra_zoo.settings.types import BadImagePolicy

BATCH_SIZE = 64
NOISE_IMAGES, NOISE_SIZE = 8, 64
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


def noise(model: nn.Module) -> Tensor:
    """Standard normal images [8, C, H, W] of the model's size; at most 64x64 where it takes any. Always the same."""
    channels, *size = image_shape(model)
    if not takes_one_size(model):
        size = [min(NOISE_SIZE, n) for n in size]
    generator = torch.Generator().manual_seed(0)
    return torch.randn(NOISE_IMAGES, channels, *size, generator=generator)


def image_shape(model: nn.Module) -> tuple[int, int, int]:
    """C, H, W of the images that a network was built for, whatever its weights were trained on."""
    channels, height, width = config_of(model).get("input_size", (3, NOISE_SIZE, NOISE_SIZE))
    height, width = _built_for(model) or (height, width)
    return getattr(model, "in_chans", channels), height, width


def takes_one_size(model: nn.Module) -> bool:
    """Whether a network takes images of one size alone, as most transformers do."""
    return bool(config_of(model).get("fixed_input_size")) and not getattr(model, "dynamic_img_size", False)


def _built_for(model: nn.Module) -> tuple[int, int] | None:
    size: tuple[int, int] | None = getattr(getattr(model, "patch_embed", None), "img_size", None)
    return size


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


def open_images(model: nn.Module, images: CalibrationImages, split: Split) -> ImageLoader:
    """Batches of some images of a split and their labels, the same ones every time.

    Args:
        model: whose preprocessing (size, crop, interpolation, mean, std) is applied.
        images: of which data set, and how many.
        split: which part of it.

    Raises:
        DataError: the data is missing, or the name unknown.
    """
    data = _Part(open_dataset(images.dataset, split, data_dir=images.data_dir), images.count)
    batch_size = min(BATCH_SIZE, len(data))
    reading = Reading(on_bad_image=images.on_bad_image)
    return create_loader(data, Preprocessing.of(model), batch_size=batch_size, reading=reading)
