"""Turns augmentation settings into transforms, and draws them from a sample's own seed."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from PIL import Image
from timm.data.transforms import ResizeKeepRatio
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torchvision.transforms import Compose, RandomCrop

from petra_zoo.data.auto_augment import mend_posterize
from petra_zoo.settings.augmentation import Augmentation

Transform = Callable[[Image.Image], Tensor]


def build_transform(
    settings: Augmentation,
    *,
    train: bool,
    input_size: tuple[int, int, int],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    native_size: int | None = None,
    crop_mode: str | None = None,
) -> Transform:
    """Builds timm's transform from an RGB image to a normalised float32 tensor [C, H, W].

    Args:
        settings: What to do to the image; for validation only `interpolation` and `crop_pct` count.
        train: Whether to augment.
        input_size: C, H, W of the network's input.
        mean: Normalisation, C values for images scaled to 0..1.
        std: Likewise.
        native_size: Height and width of all images, where they agree; such images are not resized for an input of
            the same size.
        crop_mode: How validation crops, in timm's words; its default where None.
    """
    _, height, width = input_size
    crop_pct = settings.crop_pct
    if crop_pct is None and (native_size, native_size) == (height, width):
        crop_pct = 1.0
    interpolation = settings.interpolation
    if not train and interpolation == "random":
        interpolation = "bicubic"
    pad = settings.train_crop_mode == "pad"
    create = partial(create_transform, input_size, interpolation=interpolation, mean=mean, std=std)
    if not train or settings.no_aug:
        return create(is_training=train, no_aug=train, crop_pct=crop_pct, crop_mode=crop_mode)
    crop_and_flip, colour, to_tensor = create(
        is_training=True,
        separate=True,
        train_crop_mode=None if pad else settings.train_crop_mode,
        scale=settings.scale,
        ratio=settings.ratio,
        hflip=settings.hflip,
        vflip=settings.vflip,
        color_jitter=settings.color_jitter or None,  # type: ignore[arg-type]  # timm takes None, but does not say so
        auto_augment=settings.aa,
        re_prob=settings.reprob,
        re_mode=settings.remode,
    )
    for transform in colour.transforms:
        mend_posterize(transform)
    if pad:
        # timm has no such crop; in its list the crop always comes first.
        resize = ResizeKeepRatio((height, width), interpolation=interpolation)
        crop_and_flip.transforms[:1] = [resize, RandomCrop((height, width), padding=settings.crop_padding)]
    return Compose([crop_and_flip, colour, to_tensor])


@contextmanager
def seeded_generators(*key: int) -> Iterator[None]:
    """Seeds Python's, NumPy's and torch's CPU generators from `key` (not negative), and restores their states after.

    timm's and torchvision's transforms draw from all three. CUDA's generators are left alone.
    """
    python_state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seeds = np.random.SeedSequence(key).generate_state(3).tolist()
    random.seed(seeds[0])
    np.random.seed(seeds[1])
    torch.default_generator.manual_seed(seeds[2])  # torch.manual_seed would seed CUDA's too
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
