"""What a worker measures of a conversion."""

from __future__ import annotations

from dataclasses import asdict
from functools import cache
from typing import Literal

import timm
import torch
import torch.nn.functional as F
from timm.models.resnet import ResNet
from torch import Tensor, nn

from petra_zoo.bench.conversion_jobs import FidelityJob, NetworkJob, TrainedOn
from petra_zoo.converters import convert, measure_fidelity
from petra_zoo.converters.calibration import noise
from petra_zoo.converters.memory_report import conversion_memory
from petra_zoo.converters.reconstruction import measure_runs
from petra_zoo.data.datasets import open_dataset
from petra_zoo.data.loader import ImageLoader, create_loader
from petra_zoo.data.preprocessing import Preprocessing
from petra_zoo.settings.augmentation import Augmentation
from petra_zoo.strict_json import JsonObject

_BATCH_SIZE = 64
_CALIBRATION_BATCHES = 16


def measure_conversion(job: NetworkJob | FidelityJob) -> JsonObject:
    """Couplings, errors and memory of a large network; fidelity of a small one."""
    return _network(job) if isinstance(job, NetworkJob) else _fidelity(job)


def _network(job: NetworkJob) -> JsonObject:
    source = trained_like(job.depth)
    model = convert(source, purpose=job.purpose, tolerance=job.tolerance)
    runs = measure_runs(model, noise(model))
    memory = conversion_memory(source, model, (3, 224, 224))
    return {
        "largest_error": max(run.error for run in runs),
        "bytes_per_image": {name: use._asdict() for name, use in memory.items()},
        "runs": [asdict(run) for run in runs],
    }


@cache
def trained_like(depth: int) -> ResNet:
    """A ResNet with random weights and norms as after training."""
    torch.manual_seed(depth)
    model = timm.create_model(f"resnet{depth}")
    assert isinstance(model, ResNet)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.3, 1.0)
        nn.init.normal_(norm.bias, 0.0, 0.1)
        norm.momentum = None  # a cumulative average
    with torch.no_grad():
        model.train()(noise(model))
    for norm in norms:
        norm.momentum = 0.1
    return model.eval()


def _fidelity(job: FidelityJob) -> JsonObject:
    source = train_resnet(job.source, job.seed)
    calibration: list[Tensor] = []
    if job.estimated:
        calibration = [images for images, _ in _batches(job.source, "train", 0)][:_CALIBRATION_BATCHES]
    model = convert(
        source, coupling=job.coupling, purpose="petra", tolerance=job.tolerance, calibration=calibration or None
    )
    found = measure_fidelity(source, model, _batches(job.source, "val", 0))
    return {**found.as_dict(), "largest_error": max(run.error for run in found.runs)}


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
    loader = _batches(on, "train", seed, augmented=True)
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


def _batches(on: TrainedOn, split: Literal["train", "val"], seed: int, augmented: bool = False) -> ImageLoader:
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
