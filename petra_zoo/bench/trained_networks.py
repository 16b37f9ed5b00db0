"""Small networks that are trained here, by plain backpropagation, for studies of what becomes of trained ones."""

from __future__ import annotations

from functools import cache
from typing import Literal

import timm
import torch
import torch.nn.functional as F
from timm.models.resnet import ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import nn

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
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    train_on(on, seed, model, optimizer)
    return model.eval()


@cache
def train_transformer(on: TrainedOn, seed: int) -> VisionTransformer:
    """A vision transformer of 12 blocks of width 48 for 16 patches, trained likewise."""
    torch.manual_seed(seed)
    model = timm.create_model(
        "vit_tiny_patch16_224",
        num_classes=10,
        img_size=on.img_size,
        patch_size=on.img_size // 4,
        embed_dim=48,
        depth=12,
        num_heads=4,
    )
    assert isinstance(model, VisionTransformer)
    train_on(on, seed, model, torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.05))
    return model.eval()


def train_on(on: TrainedOn, seed: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Trains all epochs; the learning rate of each group rises to what it is and falls again."""
    loader = batches_of(on, "train", seed, augmented=True)
    rates = [group["lr"] for group in optimizer.param_groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, on.epochs * len(loader))
    model.train()
    for epoch in range(on.epochs):
        loader.set_epoch(epoch)
        for images, labels in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            schedule.step()


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
