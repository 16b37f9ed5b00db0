"""Directories to publish."""

from pathlib import Path

import timm
from timm.models import save_for_hf

from petra_zoo.checkpoints.provenance import EVALUATION, write_json
from petra_zoo.evaluation.scores import Scores
from petra_zoo.settings.recipe_files import load_recipe
from petra_zoo.training.run import Result, train
from petra_zoo.training.run_directory import evaluation_record

QUICK = ["dataset=synthetic:4x8x128", "batch_size=32", "epochs=1", "workers=0", "img_size=8", "warmup_epochs=0"]


def trained(path: Path) -> Result:
    """A run of a few seconds."""
    return train(load_recipe("digits/petra_revnet_tiny", [*QUICK, f"output={path}"]), name="quick")


def untrained(path: Path, **kwargs: object) -> Path:
    """A tiny network as timm saves it: its weights, and nothing known about them."""
    model = timm.create_model("petra_revnet_tiny", **kwargs)
    config = {"input_size": (3, 8, 8), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    save_for_hf(model, str(path), safe_serialization=True, data_config=config)
    return path


def measure(path: Path, top1: float = 50.0, dataset: str = "cifar10") -> None:
    """Says what was measured of the weights in a directory."""
    result = Scores(top1, 90.0, 1.5, 200, None)  # type: ignore[arg-type]
    write_json(path / EVALUATION, evaluation_record(dataset, result, path / "model.safetensors"))
