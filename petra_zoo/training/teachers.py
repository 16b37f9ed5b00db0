"""Teachers without their weights: what a distillation can be tried with where nothing may be downloaded."""

from __future__ import annotations

from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache

from petra_zoo.checkpoints.load import create_any_model, load_model, resolve_source
from petra_zoo.errors import UserError
from petra_zoo.models.classifier import Classifier
from petra_zoo.settings.recipe import Recipe

_HUB = ("hf-hub:", "hf_hub:")


def untrained_teacher(recipe: Recipe, device: torch.device) -> Classifier | None:
    """The recipe's teacher without a download; None where it names none.

    One that lies here (a run, a directory) with its weights. One of timm's, and one whose config the Hub's cache holds,
    with random ones in the right architecture: what is tried is whether it fits.

    Raises:
        UserError: there is no such teacher, it has no trained weights, or nobody here knows its architecture.
    """
    if recipe.kd_model_name is None:
        return None
    source = resolve_source(recipe.kd_model_name)
    if source.startswith("local-dir:"):
        return load_model(source, device)
    if source.startswith(_HUB):
        source = _cached(source)
    teacher: Classifier = create_any_model(source)
    if not any(teacher.pretrained_cfg.get(key) for key in ("url", "file", "hf_hub_id")):
        raise UserError(f"kd_model_name={recipe.kd_model_name}: timm has no trained weights of it; choose another")
    return teacher.to(device).eval()


def _cached(source: str) -> str:
    """The directory in the Hub's cache that holds a repository's config.json, as timm wants it."""
    repository, _, revision = source.partition(":")[2].partition("@")
    found = try_to_load_from_cache(repository, "config.json", revision=revision or None)
    if not isinstance(found, str):
        raise UserError(
            f"kd_model_name={source}: this machine has never had it, and nothing is downloaded to try a recipe; "
            "train with it once, or try the rest with kd_model_name=null"
        )
    return f"local-dir:{Path(found).parent}"
