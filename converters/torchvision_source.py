"""torchvision's networks as sources, where timm builds the same ones and names their parameters alike: ResNets."""

from __future__ import annotations

import contextlib
import difflib
import sys

import timm
import torch
import torchvision.models
from torchvision.models import WeightsEnum

from petra_zoo.checkpoints.load import create_any_model
from petra_zoo.converters.checks import check_source, fit_weights
from petra_zoo.converters.families import family_for
from petra_zoo.errors import UserError
from petra_zoo.models.classifier import Classifier, ModelConfig, config_of

PREFIX = "torchvision:"


def load_torchvision(source: str) -> Classifier:
    """A torchvision weight as a timm network in eval mode, with torchvision's preprocessing, licence and origin.

    Args:
        source: ``torchvision:MODEL.WEIGHT``, such as ``torchvision:resnet50.IMAGENET1K_V2``; without ``.WEIGHT``
            torchvision's default. Downloaded once into torch.hub's folder.

    Raises:
        UserError: there is no such model or weight, it has no reversible form, or it cannot be downloaded.
    """
    name, _, tag = source.removeprefix(PREFIX).partition(".")
    weights = _find(source, name, tag or "DEFAULT")
    blank = create_any_model(name, device="meta")
    family_for(blank)
    _check_names(source, name, blank)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # where torch announces a download
            state_dict = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except Exception as error:  # no network, a full disk, a damaged file: each library raises its own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"cannot load {source} from {weights.url}: {reason[:120]}") from error
    fit_weights(state_dict, blank, source, name)
    model = create_any_model(name, pretrained_cfg=_config(blank, weights))
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


def _check_names(source: str, name: str, blank: Classifier) -> None:
    """Refuses, before anything is downloaded, a network whose parameters torchvision names otherwise."""
    with torch.device("meta"):
        theirs = torchvision.models.get_model(name, weights=None)
    if theirs.state_dict().keys() != blank.state_dict().keys():
        raise UserError(f"{source}: torchvision's {name} is built otherwise than timm's: convert timm's, {name}")


def _config(blank: Classifier, weights: WeightsEnum) -> ModelConfig:
    """timm's description of a network with torchvision's preprocessing."""
    config = config_of(blank)
    preset = weights.transforms()
    (crop,), (resize,) = preset.crop_size, preset.resize_size
    return {
        "architecture": config["architecture"],
        "tag": weights.name,
        "num_classes": len(weights.meta["categories"]),
        "input_size": (3, crop, crop),
        "pool_size": (crop // 32, crop // 32),
        "crop_pct": crop / resize,
        "interpolation": preset.interpolation.value,
        "mean": tuple(preset.mean),
        "std": tuple(preset.std),
        "first_conv": config.get("first_conv"),
        "classifier": config.get("classifier"),
        "license": "bsd-3-clause",
        "origin_url": weights.meta["recipe"],
    }
