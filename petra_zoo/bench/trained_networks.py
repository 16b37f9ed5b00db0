"""Small networks that are trained here, by plain backpropagation, for studies of what becomes of trained ones."""

from __future__ import annotations

from functools import cache
from typing import Literal

import timm
import torch
import torch.nn.functional as F
from timm.models.resnet import ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from petra_zoo.bench.conversion_jobs import TrainedOn
from petra_zoo.data.datasets import open_dataset
from petra_zoo.data.loader import ImageLoader, create_loader
from petra_zoo.data.preprocessing import Preprocessing
from petra_zoo.settings.augmentation import Augmentation

_BATCH_SIZE = 64


@cache
def train_resnet(on: TrainedOn, seed: int) -> ResNet:
    """A ResNet of 14 blocks for small images, trained with plain backpropagation; the same one is trained once."""
    torch.manual_seed(seed)
    model = timm.create_model(
        "resnet18",
        num_classes=10,
        zero_init_last=False,
        layers=(3, 3, 6, 2),
        channels=(16, 24, 32, 48),
        stem_type="deep",
        stem_width=8,
    )
    assert isinstance(model, ResNet)
    first = model.conv1[0]
    assert isinstance(first, nn.Conv2d)
    first.stride = (1, 1)
    model.add_module("maxpool", nn.Identity())
    loader = batches_of(on, "train", seed, augmented=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, on.epochs * len(loader))
    for epoch in range(on.epochs):
        loader.set_epoch(epoch)
        for images, labels in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@cache
def train_transformer(on: TrainedOn, seed: int) -> VisionTransformer:
    """A vision transformer of 12 blocks of width 48 for 4 patches, trained likewise, on images as they are."""
    torch.manual_seed(seed)
    model = timm.create_model(
        "vit_tiny_patch16_224",
        num_classes=10,
        img_size=on.img_size,
        patch_size=on.img_size // 2,
        embed_dim=48,
        depth=12,
        num_heads=4,
    )
    assert isinstance(model, VisionTransformer)
    train_as_they_are(on, seed, model, 3e-3)
    return model.eval()


def train_as_they_are(on: TrainedOn, seed: int, model: nn.Module, rate: float) -> None:
    """Trains what of a network wants gradients by AdamW, on images without augmentation, in an order of the seed's.

    Args:
        on: what it is trained on.
        seed: of the order.
        model: put into train mode.
        rate: the learning rate at its peak.
    """
    images, labels = images_of(on, "train")
    updates = len(images) // _BATCH_SIZE
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, on.epochs * updates)
    order = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(on.epochs):
        for batch in torch.randperm(len(images), generator=order).split(_BATCH_SIZE)[:updates]:
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            schedule.step()


@cache
def images_of(on: TrainedOn, split: Literal["train", "val"]) -> tuple[Tensor, Tensor]:
    """All images of a data set, normalised, and their labels."""
    images, labels = zip(*batches_of(on, split, 0), strict=True)
    return torch.cat(images), torch.cat(labels)


def batches_of(on: TrainedOn, split: Literal["train", "val"], seed: int, augmented: bool = False) -> ImageLoader:
    """Batches of images of a data set and their labels."""
    data, size = open_dataset(on.data, split), on.img_size
    preprocessing = Preprocessing(
        (3, size, size), data.mean, data.std, crop_pct=1.0 if size == data.image_size else 0.875
    )
    augmentation = Augmentation(train_crop_mode="pad", crop_padding=size // 8, hflip=on.hflip)
    return create_loader(
        data,
        preprocessing,
        batch_size=_BATCH_SIZE,
        augmentation=augmentation if augmented else None,
        seed=seed,
        drop_last=augmented,
    )
