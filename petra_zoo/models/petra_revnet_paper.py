"""The PETRA paper's networks (arXiv 2406.02052, section 4) in timm's registry."""

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from petra_zoo.models.layer_arguments import Argument, Arguments
from petra_zoo.models.paper_network import PetraPaperRevNet

__all__ = ["PetraPaperRevNet"]


def _cfg(**kwargs: Argument) -> Arguments:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bilinear",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "conv1",
        "classifier": "fc",
        "license": "apache-2.0",
        "paper_ids": "arXiv:2406.02052",
        **kwargs,
    }


def _cifar_cfg() -> Arguments:
    return _cfg(input_size=(3, 32, 32), num_classes=10, pool_size=(4, 4), crop_pct=1.0)


default_cfgs = generate_default_cfgs(
    {
        **{f"petra_revnet{depth}_paper.untrained": _cfg() for depth in (18, 34, 50, 101)},
        **{f"petra_revnet{depth}_paper_cifar.untrained": _cifar_cfg() for depth in (18, 34, 50, 101)},
    }
)


def _create(variant: str, pretrained: bool, kwargs: Arguments) -> PetraPaperRevNet:
    depths, bottleneck = {
        "18": ((2, 2, 2, 2), False),
        "34": ((3, 4, 6, 3), False),
        "50": ((3, 4, 6, 3), True),
        "101": ((3, 4, 23, 3), True),
    }[variant.removeprefix("petra_revnet").split("_")[0]]
    model_args = {
        "depths": depths,
        "bottleneck": bottleneck,
        "stem_type": "cifar" if variant.endswith("_cifar") else "",
        **kwargs,
    }
    return build_model_with_cfg(
        PetraPaperRevNet, variant, pretrained, feature_cfg={"feature_cls": "getter"}, **model_args
    )


@register_model
def petra_revnet18_paper(pretrained: bool = False, **kwargs: Argument) -> PetraPaperRevNet:
    """The PETRA paper's RevNet18 for ImageNet."""
    return _create("petra_revnet18_paper", pretrained, kwargs)


@register_model
def petra_revnet34_paper(pretrained: bool = False, **kwargs: Argument) -> PetraPaperRevNet:
    """The PETRA paper's RevNet34 for ImageNet."""
    return _create("petra_revnet34_paper", pretrained, kwargs)


@register_model
def petra_revnet50_paper(pretrained: bool = False, **kwargs: Argument) -> PetraPaperRevNet:
    """The PETRA paper's RevNet50 for ImageNet."""
    return _create("petra_revnet50_paper", pretrained, kwargs)


@register_model
def petra_revnet101_paper(pretrained: bool = False, **kwargs: Argument) -> PetraPaperRevNet:
    """The PETRA paper's RevNet101 for ImageNet."""
    return _create("petra_revnet101_paper", pretrained, kwargs)


@register_model
def petra_revnet18_paper_cifar(pretrained: bool = False, **kwargs: Argument) -> PetraPaperRevNet:
    """The PETRA paper's RevNet18 for 32x32 images."""
    return _create("petra_revnet18_paper_cifar", pretrained, kwargs)


@register_model
def petra_revnet34_paper_cifar(pretrained: bool = False, **kwargs: Argument) -> PetraPaperRevNet:
    """The PETRA paper's RevNet34 for 32x32 images."""
    return _create("petra_revnet34_paper_cifar", pretrained, kwargs)


@register_model
def petra_revnet50_paper_cifar(pretrained: bool = False, **kwargs: Argument) -> PetraPaperRevNet:
    """The PETRA paper's RevNet50 for 32x32 images."""
    return _create("petra_revnet50_paper_cifar", pretrained, kwargs)


@register_model
def petra_revnet101_paper_cifar(pretrained: bool = False, **kwargs: Argument) -> PetraPaperRevNet:
    """The PETRA paper's RevNet101 for 32x32 images."""
    return _create("petra_revnet101_paper_cifar", pretrained, kwargs)
