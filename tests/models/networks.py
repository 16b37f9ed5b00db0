"""Small reversible networks as after training, for the tests of models."""

from typing import Any

import timm
import torch
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn

import petra_zoo  # noqa: F401 - registers the models
from petra_zoo.models import PetraRevNet


def with_trained_statistics(model: nn.Module, seed: int = 0) -> nn.Module:
    """Norms as after training: no branch is zero, no statistic is its initial value."""
    generator = torch.Generator().manual_seed(seed)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d | nn.GroupNorm):
            m.weight.data.uniform_(0.3, 1.0, generator=generator)
            m.bias.data.normal_(0.0, 0.1, generator=generator)
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0.0, 0.1, generator=generator)
            m.running_var.uniform_(0.5, 1.5, generator=generator)
    return model


def tiny(**kwargs: object) -> PetraRevNet:
    torch.manual_seed(0)
    return with_trained_statistics(timm.create_model("petra_revnet_tiny", num_classes=10, **kwargs))


SMALL: dict[str, Any] = {"channels": (8, 8, 12, 16), "stem_type": "deep", "stem_width": 4, "num_classes": 10}


def small_resnet() -> ResNet:
    """A plain ResNet of six blocks: quick to compile."""
    torch.manual_seed(0)
    return with_trained_statistics(ResNet(BasicBlock, [2, 2, 1, 1], **SMALL))


def small(**kwargs: Any) -> PetraRevNet:
    """The reversible network with `small_resnet`'s parameters."""
    torch.manual_seed(0)
    return with_trained_statistics(PetraRevNet(BasicBlock, [2, 2, 1, 1], **SMALL, **kwargs))


def small_from(source: ResNet) -> PetraRevNet:
    """The same with a plain ResNet's weights, loaded as a user would; the coupling has never been read."""
    model = small()
    model.load_state_dict(source.state_dict())
    return model


def images(n: int = 4, size: int = 8, channels: int = 3) -> Tensor:
    return torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(2))


def difference(found: Tensor, expected: Tensor) -> float:
    """Largest absolute difference over the largest absolute value."""
    return float((found - expected).abs().max() / expected.abs().max())
