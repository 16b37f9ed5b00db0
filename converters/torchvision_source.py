"""torchvision's ResNets as sources: timm builds the same networks and names their parameters alike."""

from __future__ import annotations

import contextlib
import difflib
import sys

import timm
import torchvision.models
from timm.models.resnet import ResNet
from torchvision.models import WeightsEnum

from petra_zoo.checkpoints.load import create_any_model
from petra_zoo.converters.checks import check_blocks, check_source, fit_weights
from petra_zoo.errors import UserError
from petra_zoo.models.classifier import ModelConfig

PREFIX = "torchvision:"


def load_torchvision(source: str) -> ResNet:
    """A torchvision weight as a timm ResNet in eval mode, with torchvision's preprocessing, licence and origin.

    Args:
        source: ``torchvision:MODEL.WEIGHT``, such as ``torchvision:resnet50.IMAGENET1K_V2``; without ``.WEIGHT``
            torchvision's default. Downloaded once into torch.hub's folder.

    Raises:
        UserError: there is no such model or weight, it has no reversible form, or it cannot be downloaded.
    """
    name, _, tag = source.removeprefix(PREFIX).partition(".")
    weights = _find(source, name, tag or "DEFAULT")
    blank = create_any_model(name, device="meta")
    check_blocks(blank)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # where torch announces a download
            state_dict = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except Exception as error:  # no network, a full disk, a damaged file: each library raises its own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"cannot load {source} from {weights.url}: {reason[:120]}") from error
    fit_weights(state_dict, blank, source, name)
    model = create_any_model(name, pretrained_cfg=_config(name, weights))
    model.load_state_dict(state_dict)
    return check_source(model).eval()


def _find(source: str, name: str, tag: str) -> WeightsEnum:
    known = [model for model in torchvision.models.list_models(module=torchvision.models) if timm.is_model(model)]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.4) or ["resnet50"]
        raise UserError(f"{source}: torchvision and timm have no network {name!r} in common; nearest: {near[0]}")
    weights = torchvision.models.get_model_weights(name)
    try:
        return weights[tag]
    except KeyError:
        raise UserError(f"{source}: {name} has the weights {', '.join(w.name for w in weights)}, not {tag!r}") from None


def _config(name: str, weights: WeightsEnum) -> ModelConfig:
    """timm's description of a network with torchvision's preprocessing."""
    preset = weights.transforms()
    (crop,), (resize,) = preset.crop_size, preset.resize_size
    return {
        "architecture": name,
        "tag": weights.name,
        "num_classes": len(weights.meta["categories"]),
        "input_size": (3, crop, crop),
        "pool_size": (crop // 32, crop // 32),
        "crop_pct": crop / resize,
        "interpolation": preset.interpolation.value,
        "mean": tuple(preset.mean),
        "std": tuple(preset.std),
        "first_conv": "conv1",
        "classifier": "fc",
        "license": "bsd-3-clause",
        "origin_url": weights.meta["recipe"],
    }
