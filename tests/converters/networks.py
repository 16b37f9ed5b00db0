"""Networks and images for the tests of the converter."""

from functools import cache

import timm
import torch
import torch.nn.functional as F
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn

from petra_zoo.data.datasets import Split, open_dataset
from petra_zoo.data.loader import create_loader
from petra_zoo.data.preprocessing import Preprocessing
from tests.models.networks import with_trained_statistics


def source(name: str, seed: int = 0, **kwargs: object) -> ResNet:
    """A timm ResNet with norms as after training: statistics that fit its activations, no branch zero."""
    torch.manual_seed(seed)
    model = with_trained_statistics(timm.create_model(name, **{"num_classes": 5, **kwargs}), seed)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.reset_running_stats()
            m.momentum = None
    with torch.no_grad():
        model.train()(images(16, 64, seed=3))
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = 0.1
    return model.eval()


def images(n: int = 4, size: int = 64, seed: int = 2) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


@cache
def labelled(name: str, split: Split) -> list[tuple[Tensor, Tensor]]:
    """Batches of a data set that is always there: digits at 8x8, shapes at 16x16."""
    data, n = open_dataset(name, split), {"digits": 8, "shapes": 16}[name]
    preprocessing = Preprocessing((3, n, n), data.mean, data.std, crop_pct=1.0 if n == data.image_size else 0.875)
    return list(create_loader(data, preprocessing, batch_size=64))


def calibration(name: str) -> list[Tensor]:
    """Training images without their labels."""
    return [x for x, _ in labelled(name, "train")][:16]


@cache
def trained(name: str, epochs: int, layers: tuple[int, ...] = (3, 3, 4, 2)) -> ResNet:
    """A small ResNet trained with plain backpropagation; not to be changed."""
    torch.manual_seed(0)
    model = ResNet(
        BasicBlock,
        layers,
        num_classes=10,
        stem_type="deep",
        stem_width=8,
        channels=(16, 24, 32, 48),
        zero_init_last=False,
    )
    model.conv1[0].stride = (1, 1)
    model.maxpool = nn.Identity()
    batches = labelled(name, "train")
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, epochs * len(batches))
    for _ in range(epochs):
        for i in torch.randperm(len(batches)).tolist():
            x, labels = batches[i]
            optimizer.zero_grad()
            F.cross_entropy(model(x), labels).backward()
            optimizer.step()
            schedule.step()
    return model.eval()
