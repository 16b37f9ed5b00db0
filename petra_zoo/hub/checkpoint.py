"""A directory with a trained model, read for publishing: the model and everything the directory knows about it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NotRequired, TypedDict, TypeGuard

import torch
from torch import Tensor

from petra_zoo.checkpoints.load import load_model
from petra_zoo.checkpoints.provenance import ENVIRONMENT, EVALUATION, sha256
from petra_zoo.checkpoints.public import public_recipe, public_record, without_places
from petra_zoo.errors import UserError
from petra_zoo.models.classifier import Classifier, UnitClassifier, as_unit_classifier
from petra_zoo.settings.recipe import Recipe
from petra_zoo.settings.recipe_files import load_recipe
from petra_zoo.strict_json import JsonObject

FIDELITY = "fidelity.json"
PROBES = 4  # images on which logits are compared


# What is read of environment.json; a name of a package is no identifier.
Environment = TypedDict(
    "Environment",
    {
        "petra-zoo": str,
        "torch": str,
        "timm": str,
        "python": str,
        "processor": str,
        "threads": int,
        "devices": list[str],
        "processes": int,
        "wall_seconds": float,
        "peak_memory": NotRequired[int],
        "peak_memory_is": NotRequired[str],
    },
)


class Measured(TypedDict):
    """What is read of evaluation.json; scores in percent."""

    dataset: str
    split: NotRequired[str]
    images: int
    top1: NotRequired[float]
    top5: NotRequired[float]
    loss: float
    date: NotRequired[str]


@dataclass(frozen=True)
class Checkpoint:
    """What is known about a trained model, and may be published: no places of this machine but `path`.

    Attributes:
        path: its directory.
        config: config.json.
        model: on the CPU, in eval mode.
        sha256: of model.safetensors.
        recipe: it was trained by; None where it was not trained here.
        environment: machine, versions, time and memory of the training, or None.
        evaluation: what was measured of these very weights, or None.
        fidelity: the comparison with what it was converted from, or None.
    """

    path: Path
    config: JsonObject
    model: UnitClassifier
    sha256: str
    recipe: Recipe | None
    environment: Environment | None
    evaluation: Measured | None
    fidelity: JsonObject | None

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
    model = _load(path)
    if not torch.isfinite(probe(model)).all():
        raise UserError(f"{path}: the model's logits are not finite, its training has diverged")
    digest = sha256(path / "model.safetensors")
    recipe, fidelity = path / "recipe.yaml", _read_json(path / FIDELITY)
    config = without_places(_read_json(path / "config.json"))
    assert isinstance(config, dict)
    return Checkpoint(
        path=path,
        config=config,
        model=model,
        sha256=digest,
        recipe=public_recipe(load_recipe(str(recipe))) if recipe.is_file() else None,
        environment=_read_environment(path / ENVIRONMENT),
        evaluation=_read_measured(path / EVALUATION, digest),
        fidelity=public_record(fidelity) if fidelity else None,
    )


def _load(path: Path) -> UnitClassifier:
    model = load_model(str(path), torch.device("cpu"))
    try:
        return as_unit_classifier(model)
    except UserError as error:
        raise UserError(f"{path} cannot be published: {error}") from error


@torch.no_grad()
def probe(model: Classifier) -> Tensor:
    """Logits [4, classes] of the same noise every time: equal for equal models."""
    generator = torch.Generator().manual_seed(0)
    return model.eval()(torch.randn(PROBES, *model.pretrained_cfg["input_size"], generator=generator))


def _read_json(path: Path) -> JsonObject:
    """A file's JSON object; empty where there is no file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}): remove it, or write it anew") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object: remove it, or write it anew")
    return content


def _read_environment(path: Path) -> Environment | None:
    record = _read_json(path)
    if not record:
        return None
    if not _is_environment(record):
        raise _incomplete(path, Environment.__required_keys__ - record.keys())
    return record


def _read_measured(path: Path, weights_sha256: str) -> Measured | None:
    """What was measured of these very weights, without places of this machine."""
    record = public_record(_read_json(path))
    if record.get("weights_sha256") != weights_sha256:
        return None
    if not _is_measured(record):
        raise _incomplete(path, Measured.__required_keys__ - record.keys())
    return record


def _is_environment(record: JsonObject) -> TypeGuard[Environment]:
    return Environment.__required_keys__ <= record.keys()


def _is_measured(record: JsonObject) -> TypeGuard[Measured]:
    return Measured.__required_keys__ <= record.keys()


def _incomplete(path: Path, missing: frozenset[str]) -> UserError:
    return UserError(f"{path} lacks {', '.join(sorted(missing))}: remove it, or write it anew")
