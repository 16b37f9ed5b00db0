"""A directory with a trained model, read for publishing: the model and everything the directory knows about it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from petra_zoo.checkpoints.load import load_model
from petra_zoo.checkpoints.provenance import ENVIRONMENT, EVALUATION, sha256
from petra_zoo.checkpoints.public import public_recipe, public_record, without_places
from petra_zoo.errors import UserError
from petra_zoo.settings.recipe import Recipe
from petra_zoo.settings.recipe_files import load_recipe

FIDELITY = "fidelity.json"
PROBES = 4  # images on which logits are compared


@dataclass(frozen=True)
class Checkpoint:
    """What is known about a trained model, and may be published: no places of this machine but `path`.

    Attributes:
        path: its directory.
        config: config.json.
        model: on the CPU, in eval mode.
        sha256: of model.safetensors.
        recipe: it was trained by; None where it was not trained here.
        environment: machine, versions, time and memory of the training, or empty.
        evaluation: what was measured of these very weights, or None.
        fidelity: the comparison with what it was converted from, or None.
    """

    path: Path
    config: dict[str, Any]
    model: Any
    sha256: str
    recipe: Recipe | None
    environment: dict[str, Any]
    evaluation: dict[str, Any] | None
    fidelity: dict[str, Any] | None

    @property
    def architecture(self) -> str:
        """Its name in timm's registry."""
        return str(self.config["architecture"])

    @property
    def input_size(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        channels, height, width = self.model.pretrained_cfg["input_size"]
        return channels, height, width


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads a run, or a directory that `petra-zoo convert` or timm wrote.

    Raises:
        UserError: there is no such directory, it has no safetensors or no config, they do not fit each other, the
            network is none of the zoo's, or its logits are not finite.
    """
    if not path.is_dir():
        raise UserError(f"there is no directory {path}: push what petra-zoo train or petra-zoo convert wrote")
    if not (path / "model.safetensors").is_file():
        pickles = [file.name for file in sorted(path.iterdir()) if file.suffix in (".bin", ".pth", ".pt", ".tar")]
        found = f", only {pickles[0]}, a pickle, which is never published" if pickles else ""
        raise UserError(
            f"{path} has no model.safetensors{found}: write one with petra-zoo convert or timm's save_for_hf"
        )
    model = load_model(str(path), torch.device("cpu"))
    if not hasattr(model, "units"):
        raise UserError(f"{path} holds a {type(model).__name__}, which is not reversible: petra-zoo convert it first")
    if not torch.isfinite(probe(model)).all():
        raise UserError(f"{path}: the model's logits are not finite, its training has diverged")
    digest = sha256(path / "model.safetensors")
    evaluation = _read_json(path / EVALUATION)
    recipe, fidelity = path / "recipe.yaml", _read_json(path / FIDELITY)
    return Checkpoint(
        path=path,
        config=without_places(_read_json(path / "config.json") or {}),
        model=model,
        sha256=digest,
        recipe=public_recipe(load_recipe(str(recipe))) if recipe.is_file() else None,
        environment=_read_json(path / ENVIRONMENT) or {},
        evaluation=public_record(evaluation) if evaluation and evaluation.get("weights_sha256") == digest else None,
        fidelity=public_record(fidelity) if fidelity else None,
    )


@torch.no_grad()
def probe(model: Any) -> Tensor:
    """Logits [4, classes] of the same noise every time: equal for equal models."""
    generator = torch.Generator().manual_seed(0)
    return model.eval()(torch.randn(PROBES, *model.pretrained_cfg["input_size"], generator=generator))


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}): remove it, or write it anew") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object: remove it, or write it anew")
    return content
