"""What belongs into a checkpoint's repository: its files, by their names there."""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path

import yaml
from huggingface_hub import eval_result_entries_to_yaml

from petra_zoo.checkpoints.provenance import sha256
from petra_zoo.hub.card import can_draw, eval_results, make_card
from petra_zoo.hub.checkpoint import FIDELITY, Checkpoint
from petra_zoo.hub.curve import training_curve
from petra_zoo.settings.recipe import Recipe
from petra_zoo.settings.recipe_files import save_recipe
from petra_zoo.strict_json import JsonObject, to_json

Files = dict[str, Path | bytes]


def repository_files(
    checkpoint: Checkpoint,
    load_as: str,
    *,
    card_only: bool = False,
    license: str | None = None,
    dataset_id: str | None = None,
) -> Files:
    """Files by their name in the repository; the same content every time, so that a second push changes nothing.

    Places of the machine that trained (directories of data, results, teachers and sources) are left out of what is
    published, see `petra_zoo.checkpoints.public`. A README.md in the directory is taken instead of a generated card.

    Args:
        card_only: the card and the measured results alone.
        checkpoint, load_as, license, dataset_id: see `make_card`.
    """
    path, own_card = checkpoint.path, checkpoint.path / "README.md"
    files: Files = {}
    if own_card.is_file():
        files["README.md"] = own_card
    else:
        files["README.md"] = str(make_card(checkpoint, load_as, license=license, dataset_id=dataset_id)).encode()
    if (measured := eval_results(checkpoint, dataset_id)) is not None:
        name, entries = measured
        files[name] = yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False).encode()
    if (path / "summary.csv").is_file() and can_draw():
        files["training_curve.png"] = training_curve(path / "summary.csv")  # the card shows it
    if card_only:
        return files
    files["model.safetensors"] = path / "model.safetensors"
    is_public = checkpoint.config == json.loads((path / "config.json").read_text(encoding="utf-8"))
    files["config.json"] = path / "config.json" if is_public else _json(checkpoint.config)
    if (path / "summary.csv").is_file():
        files["train_summary.csv"] = path / "summary.csv"
    if checkpoint.recipe is not None:
        files["recipe.yaml"] = _yaml(checkpoint.recipe)
    if checkpoint.fidelity is not None:
        files[FIDELITY] = _json(checkpoint.fidelity)
    files |= {file.name: file for file in sorted(path.glob("fidelity.*")) if file.suffix in (".md", ".png")}
    return files


def size_of(content: Path | bytes) -> int:
    """In bytes."""
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def read(content: Path | bytes) -> bytes:
    """All of it."""
    return content if isinstance(content, bytes) else content.read_bytes()


def digest(content: Path | bytes) -> str:
    """Its SHA-256, in hexadecimal."""
    return hashlib.sha256(content).hexdigest() if isinstance(content, bytes) else sha256(content)


def _json(content: JsonObject) -> bytes:
    return (to_json(content, indent=2) + "\n").encode()


def _yaml(recipe: Recipe) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        save_recipe(recipe, Path(folder) / "recipe.yaml")
        return (Path(folder) / "recipe.yaml").read_bytes()
