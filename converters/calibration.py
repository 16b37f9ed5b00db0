"""Images to calibrate, measure and compare on: tensors at hand, or noise."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from petra_zoo.data.calibration_images import BATCH_SIZE
from petra_zoo.errors import UserError
from petra_zoo.models.classifier import config_of

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
