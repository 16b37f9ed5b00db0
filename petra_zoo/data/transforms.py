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
from petra_zoo.data.preprocessing import Preprocessing
from petra_zoo.settings.augmentation import Augmentation

Transform = Callable[[Image.Image], Tensor]


def evaluation_transform(preprocessing: Preprocessing) -> Transform:
    """timm's transform from an RGB image to a tensor of bytes [C, H, W], without anything random."""
    return create_transform(**preprocessing.as_dict(), is_training=False, normalize=False)


def training_transform(settings: Augmentation, preprocessing: Preprocessing) -> Transform:
    """timm's transform from an RGB image to a tensor of bytes [C, H, W], augmented; see `BatchTransform` for the rest.

    Random erasing comes behind the normalisation, so with it the tensor is float32 and normalised.

    Args:
        settings: What to do to the image.
        preprocessing: Of it only size and normalisation count.
    """
    erases = settings.reprob > 0.0 and not settings.no_aug
    _, height, width = preprocessing.input_size
    create = partial(
        create_transform,
        preprocessing.input_size,
        is_training=True,
        interpolation=settings.interpolation,
        mean=preprocessing.mean,
        std=preprocessing.std,
        normalize=erases,
    )
    if settings.no_aug:
        return create(no_aug=True)
    pad = settings.train_crop_mode == "pad"
    crop_and_flip, colour, to_tensor = create(
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
        resize = ResizeKeepRatio((height, width), interpolation=settings.interpolation)
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
