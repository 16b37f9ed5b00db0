"""Models from wherever they are: by name, from a run directory, from the Hub."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import timm
import torch

from petra_zoo.checkpoints.hub_errors import explain
from petra_zoo.errors import UserError


def create_model(name: str, *, zoo_only: bool = True, **kwargs: Any) -> Any:
    """`timm.create_model` with one clear line where the model does not exist; `zoo_only` wants one with units.

    Raises:
        UserError: no such model, one without units, or arguments that it does not take.
    """
    local = name.startswith(("hf-hub:", "hf_hub:", "local-dir:"))
    architecture = name.split(".", 1)[0]
    known = timm.list_models("petra_*" if zoo_only else "*")
    if not local and architecture not in known:
        near = difflib.get_close_matches(architecture, known, n=3, cutoff=0.4) or known[:3]
        what = "is timm's, but not reversible" if timm.is_model(architecture) else "is unknown"
        raise UserError(f"model {name!r} {what}; nearest: {', '.join(near)} (petra-zoo list shows all)")
    try:
        return timm.create_model(name, **kwargs)
    except Exception as error:  # a repository can hold anything
        raise explain(f"cannot load {name}" if local else f"model {name!r}", error, from_config=local) from error


def load_model(source: str, device: torch.device, cache_dir: Path | None = None) -> Any:
    """A trained model in eval mode: a run directory, ``hf-hub:``/``local-dir:``, or a name with pretrained weights.

    Raises:
        UserError: there is no such run or model, or its weights cannot be read.
    """
    model = create_model(resolve_source(source), zoo_only=False, pretrained=True, cache_dir=cache_dir)
    return model.to(device).eval()


def resolve_source(source: str) -> str:
    """A run directory, a Hub name or a model's name as timm wants it.

    Raises:
        UserError: it looks like a run directory, but is none.
    """
    path = Path(source)
    if path.is_dir():
        for name in ("config.json", "model.safetensors"):
            if not (path / name).is_file():
                raise UserError(f"{path} has no {name}: expected a directory that petra-zoo train or timm wrote")
        return f"local-dir:{path}"
    if "/" in source and not source.startswith(("hf-hub:", "hf_hub:", "local-dir:")):
        raise UserError(f"there is no run directory {source!r}; for a model on the Hub write hf-hub:{source}")
    return source


def check_image_size(model: Any, name: str, size: int) -> None:
    """Refuses images smaller than what the network reduces one pixel from.

    Raises:
        UserError: the image is too small; names a model that takes it.
    """
    reduction = model.feature_info[-1]["reduction"]
    if size < reduction:
        raise UserError(
            f"images of {size}x{size} are too small for {name}, which reduces by {reduction}: "
            f"use img_size={reduction} or more, or a model for small images (petra_revnet_tiny, petra_revnet18_cifar)"
        )
