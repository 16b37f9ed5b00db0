"""Batches of a data set as a checkpoint's preprocessing wants them, in order and without augmentation."""

from __future__ import annotations

from typing import TypedDict, Unpack

from petra_zoo.data.image_dataset import ImageDataset
from petra_zoo.data.loader import ImageLoader, create_loader
from petra_zoo.data.preprocessing import Preprocessing
from petra_zoo.settings.augmentation import Augmentation
from petra_zoo.settings.types import BadImagePolicy


class LoaderOptions(TypedDict, total=False):
    """What `create_loader` takes besides, see there."""

    workers: int
    on_bad_image: BadImagePolicy
    leave_out: bool
    fingerprints: bool


def validation_loader(
    data: ImageDataset, preprocessing: Preprocessing, batch_size: int, **options: Unpack[LoaderOptions]
) -> ImageLoader:
    """Batches of prepared images and their labels.

    Raises:
        UserError: see `create_loader`.
    """
    return create_loader(
        data,
        batch_size=batch_size,
        train=False,
        input_size=preprocessing.input_size,
        mean=preprocessing.mean,
        std=preprocessing.std,
        augmentation=Augmentation(interpolation=preprocessing.interpolation, crop_pct=preprocessing.crop_pct),
        crop_mode=preprocessing.crop_mode,
        **options,
    )
