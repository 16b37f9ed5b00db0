"""Source networks: where they come from, and which of them have a reversible form."""

from __future__ import annotations

import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from timm.models import load_state_dict
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn

from petra_zoo.errors import UserError
from petra_zoo.models.memory_modes import MemoryModes
from petra_zoo.models.petra_revnet import LAYERS
from petra_zoo.training.build import create_model
from petra_zoo.training.checkpoint_evaluation import load_model

WEIGHT_FILES = (".safetensors", ".pth", ".pt", ".bin")
_INSTEAD = "use a ResNet of timm's BasicBlock or Bottleneck instead, such as resnet50, seresnet50 or resnext50_32x4d"


def load_source(source: str, architecture: str | None = None) -> ResNet:
    """A trained ResNet in eval mode, on the CPU.

    Args:
        source: a timm name (its pretrained weights), ``hf-hub:ORG/NAME``, ``local-dir:DIR``, a run directory, or a
            file of weights (.safetensors, .pth, .pt, .bin).
        architecture: of a file of weights, a timm name.

    Raises:
        UserError: there is no such source, it is damaged, holds code, does not fit its architecture, or has no
            reversible form.
    """
    if Path(source).suffix in WEIGHT_FILES:
        if architecture is None:
            raise UserError(f"{source} holds weights only: say whose they are with --arch, such as --arch resnet50")
        return _load_file(Path(source), architecture)
    if architecture is not None:
        raise UserError(f"--arch goes with a file of weights ({', '.join(WEIGHT_FILES)}); {source} has its own")
    if timm.is_model(source.split(".", 1)[0]):  # before anything is downloaded
        check_blocks(create_model(source, zoo_only=False, device="meta"))
    model: Any = load_model(source, torch.device("cpu"))
    check_source(model)
    return model


def check_source(network: Any) -> None:
    """Refuses what cannot be converted.

    Raises:
        UserError: see `check_blocks`; or a weight or statistic is not finite.
    """
    check_blocks(network)
    bad = [name for name, x in network.state_dict().items() if x.is_floating_point() and not x.isfinite().all()]
    if bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise UserError(f"{name_of(network)}: {bad[0]}{more} holds values that are not finite")


def check_blocks(network: Any) -> None:
    """Refuses networks that are not residual in the way that has a coupled form; works on the meta device.

    Raises:
        UserError: naming what the network is made of, and what could be used instead.
    """
    name = name_of(network)
    if isinstance(network, MemoryModes):
        raise UserError(f"{name} is reversible already: train it as it is, or convert the ResNet it came from")
    if type(network) is not ResNet:
        raise UserError(f"{name} cannot be converted, it is a {type(network).__name__}: {_INSTEAD}")
    for layer in (getattr(network, layer) for layer in LAYERS):
        if not isinstance(layer, nn.Sequential) or not len(layer):
            raise UserError(f"{name} cannot be converted, some of its layers are missing: {_INSTEAD}")
        for block in layer:
            if type(block) not in (BasicBlock, Bottleneck):
                raise UserError(f"{name} cannot be converted, its blocks are {type(block).__name__}: {_INSTEAD}")


def name_of(network: Any) -> str:
    """The architecture's name where timm made the network, else its class."""
    return (getattr(network, "pretrained_cfg", None) or {}).get("architecture") or type(network).__name__


def _load_file(path: Path, architecture: str) -> ResNet:
    blank = create_model(architecture, zoo_only=False, device="meta")
    check_blocks(blank)
    weights = _read(path)
    if "fc.weight" in weights and weights["fc.weight"].ndim == 2:
        blank.reset_classifier(len(weights["fc.weight"]))
    expected = blank.state_dict()
    missing, extra = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    wrong = [key for key in expected if key in weights and weights[key].shape != expected[key].shape]
    if any(key.endswith(".coupling") for key in extra):
        raise UserError(f"{path} holds couplings, it is reversible already: convert the ResNet it came from")
    problems = [f"{what} {_some(keys)}" for what, keys in (("missing", missing), ("unexpected", extra)) if keys]
    if wrong:
        key = wrong[0]
        shapes = f"{list(weights[key].shape)} instead of {list(expected[key].shape)}"
        problems.append(f"{key} is {shapes}" + (f" ({len(wrong) - 1} more differ)" if wrong[1:] else ""))
    if problems:
        raise UserError(f"{path} does not fit {architecture}: {'; '.join(problems)}")
    model = create_model(architecture, zoo_only=False, num_classes=blank.num_classes)
    model.load_state_dict(weights)
    check_source(model)
    return model.eval()


def _read(path: Path) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of pickle protocols that it then refuses
            weights = load_state_dict(str(path), weights_only=True)
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except (pickle.UnpicklingError, OSError, EOFError, RuntimeError, SafetensorError, ValueError) as error:
        text = f"{error.__cause__} {error}"  # timm puts its own words before torch's
        if "weights_only" in text:
            found = re.search(r"GLOBAL (\S+)|[Uu]nsupported globals?: (\S+)", text)
            what = f"would run code when loaded ({found[1] or found[2]})" if found else "is no plain file of tensors"
            raise UserError(f"{path} {what} and is refused: save the weights alone, as safetensors") from error
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} cannot be read, it is damaged or no file of weights: {reason[:120]}") from error
    except (AttributeError, TypeError):
        weights = {}
    if not weights or not all(isinstance(x, Tensor) for x in weights.values()):
        raise UserError(f"{path} holds no state dict: expected names and tensors, as model.state_dict() gives them")
    return weights


def _some(keys: list[str]) -> str:
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return ", ".join(keys[:3]) + more
