"""Reversible vision transformers (CVPR 2022, arXiv 2302.04869) in timm's registry."""

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from petra_zoo.models.layer_arguments import Argument, Arguments
from petra_zoo.models.revvit_network import PetraRevViT
from petra_zoo.models.revvit_weights import load_filter

__all__ = ["PetraRevViT"]

_PUBLISHED = "https://dl.fbaipublicfiles.com/pyslowfast/rev/"


def _cfg(**kwargs: Argument) -> Arguments:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "apache-2.0",
        "paper_ids": "arXiv:2302.04869",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "petra_revvit_tiny.untrained": _cfg(),
        "petra_revvit_small.fb_in1k": _cfg(url=f"{_PUBLISHED}REV_VIT_S.pyth"),
        "petra_revvit_base.fb_in1k": _cfg(url=f"{_PUBLISHED}REV_VIT_B.pyth"),
        "petra_revvit_micro.untrained": _cfg(input_size=(3, 32, 32), num_classes=10, crop_pct=1.0),
    }
)


def _create(variant: str, pretrained: bool, model_args: Arguments, kwargs: Arguments) -> PetraRevViT:
    return build_model_with_cfg(
        PetraRevViT,
        variant,
        pretrained,
        pretrained_filter_fn=load_filter,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        **{**model_args, **kwargs},
    )


@register_model
def petra_revvit_tiny(pretrained: bool = False, **kwargs: Argument) -> PetraRevViT:
    """Reversible ViT-Ti/16: two streams of width 192, 12 blocks."""
    return _create("petra_revvit_tiny", pretrained, {"embed_dim": 192, "depth": 12, "num_heads": 3}, kwargs)


@register_model
def petra_revvit_small(pretrained: bool = False, **kwargs: Argument) -> PetraRevViT:
    """Reversible ViT-S/16 as published: two streams of width 384, 12 blocks."""
    return _create("petra_revvit_small", pretrained, {"embed_dim": 384, "depth": 12, "num_heads": 6}, kwargs)


@register_model
def petra_revvit_base(pretrained: bool = False, **kwargs: Argument) -> PetraRevViT:
    """Reversible ViT-B/16 as published: two streams of width 768, 12 blocks."""
    return _create("petra_revvit_base", pretrained, {"embed_dim": 768, "depth": 12, "num_heads": 12}, kwargs)


@register_model
def petra_revvit_micro(pretrained: bool = False, **kwargs: Argument) -> PetraRevViT:
    """A small reversible ViT (two streams of width 64, 8 blocks) for images of 8x8 to 32x32, patches of 4x4."""
    model_args = {"img_size": 32, "patch_size": 4, "embed_dim": 64, "depth": 8, "num_heads": 4, "mlp_ratio": 2.0}
    return _create("petra_revvit_micro", pretrained, model_args, kwargs)
