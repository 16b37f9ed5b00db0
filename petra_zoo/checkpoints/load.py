"""Models from wherever they are: by name, from a run directory, from the Hub."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from pydantic import TypeAdapter, ValidationError
from timm.layers import to_2tuple
from timm.models import get_model_input_config

from petra_zoo.checkpoints.hub_errors import explain
from petra_zoo.checkpoints.reachable import HUB_PREFIXES, hub_repository, one_attempt
from petra_zoo.errors import UserError
from petra_zoo.models.classifier import (
    Classifier,
    Feature,
    ModelConfig,
    UnitClassifier,
    as_classifier,
    as_unit_classifier,
    config_of,
)
from petra_zoo.models.describe import nearest_models, zoo_names

LAST = "last"  # in a run directory: the last model, where the run's own is the best one
WEIGHT_FILES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar", ".pyth")
FROM_A_CONFIG = (*HUB_PREFIXES, "local-dir:")


def create_model(name: str, **arguments: Any) -> UnitClassifier:
    """A model with units, which the engine can train: of the zoo, or of whoever registers one with timm.

    Args:
        name: what `timm.create_model` takes.
        arguments: what it takes besides.

    Raises:
        UserError: no such model, one without units, or arguments that it does not take.
    """
    _check_known(name, zoo_names)
    model = create_any_model(name, **arguments)
    try:
        return as_unit_classifier(model)
    except UserError as error:
        if hasattr(model, "units"):  # somebody's own, to be mended: others are no way out
            raise UserError(f"model {name!r}: {error}") from error
        raise UserError(f"model {name!r}: {error}; {nearest_models(name, zoo_names())}") from error


def create_any_model(name: str, **arguments: Any) -> Classifier:
    """`timm.create_model` with one clear line where the model does not exist.

    Raises:
        UserError: no such model, or arguments that it does not take.
    """
    _check_known(name, timm.list_models)
    local = name.startswith(FROM_A_CONFIG)
    repository = hub_repository(name) if local or arguments.get("pretrained") else None
    try:
        with one_attempt(repository):
            model = as_classifier(timm.create_model(name, **arguments))
            if local:
                check_config(model.pretrained_cfg)
            if not hasattr(model, "in_chans"):  # somebody's own
                model.in_chans = arguments.get("in_chans", config_of(model).get("input_size", (3,))[0])
            return model
    except Exception as error:  # a repository can hold anything
        raise explain(f"cannot load {name}" if local else f"model {name!r}", error, from_config=local) from error


def check_config(config: ModelConfig) -> None:
    """Refuses a checkpoint's words about itself that are of another type than they should be.

    Raises:
        UserError: names the first.
    """
    try:
        TypeAdapter(ModelConfig).validate_python({key: x for key, x in config.items() if x is not None})
    except ValidationError as error:
        wrong = error.errors()[0]
        key = str(wrong["loc"][0])
        value = repr({**config}[key])
        raise UserError(f"pretrained_cfg.{key} is {value:.60}: {wrong['msg'].lower()}") from error


def load_model(source: str, device: torch.device, cache_dir: Path | None = None) -> Classifier:
    """A trained model in eval mode: a run directory, ``hf-hub:``/``local-dir:``, or a name with pretrained weights.

    Raises:
        UserError: there is no such run or model, or its weights cannot be read.
    """
    model = create_any_model(resolve_source(source), pretrained=True, cache_dir=cache_dir)
    return model.to(device).eval()


def resolve_source(source: str) -> str:
    """A run directory, a Hub name or a model's name as timm wants it; RUN@last is the last model of a run.

    Raises:
        UserError: it looks like a run directory, but is none.
    """
    path = run_path(source)
    if path.is_dir():
        for name in ("config.json", "model.safetensors"):
            if not (path / name).is_file():
                raise UserError(f"{path} has no {name}: expected a directory that petra-zoo train or timm wrote")
        return f"local-dir:{path}"
    if path.suffix in WEIGHT_FILES:
        if not path.exists():
            raise UserError(f"there is no file {source}")
        raise UserError(
            f"{source} has weights, and no word of what network they are of: give the directory that it is in, "
            f"with its config.json, or make one: petra-zoo convert {source} --arch NAME --output DIR"
        )
    if "/" in source and not source.startswith(FROM_A_CONFIG):
        raise UserError(f"there is no run directory {source!r}; for a model on the Hub write hf-hub:{source}")
    return source


def check_named(source: str) -> None:
    """Refuses what names no model, before anything is loaded.

    Raises:
        UserError: as `resolve_source`; or there is no such model, with the nearest.
    """
    _check_known(resolve_source(source), timm.list_models)


def run_path(source: str) -> Path:
    """Where a run's model is: the best one's directory, or that of the last one for RUN@last."""
    run = Path(source.removesuffix(f"@{LAST}"))
    if source.endswith(f"@{LAST}") and run.is_dir():
        return run / LAST if (run / LAST).is_dir() else run
    return Path(source)


def check_image_size(model: Classifier, name: str, size: int) -> None:
    """Refuses images smaller than what the network reduces one pixel from.

    Raises:
        UserError: the image is too small; names a model that takes it.
    """
    features: Sequence[Feature] = getattr(model, "feature_info", ())  # none: nobody knows what it reduces by
    reduction = features[-1]["reduction"] if features else 1
    if size < reduction:
        raise UserError(
            f"images of {size}x{size} are too small for {name}, which reduces by {reduction}: "
            f"take {reduction}x{reduction} or more, or a model for small images "
            "(petra_revnet_tiny, petra_revnet18_cifar)"
        )


def set_image_size(model: Classifier, name: str, height: int, width: int) -> None:
    """Fits a network that takes images of one size only, as most transformers do, to images of another; checks others.

    Its position embeddings are resampled, and what is saved of it says the new size.

    Raises:
        UserError: the images are too small, or no multiple of its patches.
    """
    check_image_size(model, name, min(height, width))
    config = get_model_input_config(model)
    resize: Callable[..., None] | None = getattr(model, "set_input_size", None)
    # A network that takes any size has one of its own all the same, which rotary embeddings in its units go by.
    has_one = config["fixed_input_size"] or getattr(model, "dynamic_img_size", False)
    if resize is None or not has_one or tuple(config["input_size"][-2:]) == (height, width):
        return
    patch: tuple[int, int] = to_2tuple(model.feature_info[-1]["reduction"])
    if height % patch[0] or width % patch[1]:
        near = "x".join(str(max(1, round(n / p)) * p) for n, p in zip((height, width), patch, strict=True))
        raise UserError(
            f"images of {height}x{width} are no multiple of {name}'s patches of {patch[0]}x{patch[1]}; nearest: {near}"
        )
    resize(img_size=(height, width))


def _check_known(name: str, known: Callable[[], list[str]]) -> None:
    if not name.startswith(FROM_A_CONFIG) and not timm.is_model(name.partition(".")[0]):
        raise UserError(f"model {name!r} is unknown; {nearest_models(name, known())}")
