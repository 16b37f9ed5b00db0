"""Evaluating a saved run, a checkpoint or a named model on a data set, with the preprocessing that travels with it."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.data import resolve_model_data_config

from petra_zoo.errors import UserError
from petra_zoo.training.build import check_image_size, choose_device, create_model
from petra_zoo.training.datasets import BadImagePolicy, ImageDataset, open_dataset
from petra_zoo.training.evaluation import Evaluation, evaluate
from petra_zoo.training.loader import create_loader
from petra_zoo.training.recipe import load_recipe
from petra_zoo.training.settings import Augmentation

# timm's results files, validate.py --results-file
COLUMNS = ("model", "top1", "top1_err", "top5", "top5_err", "param_count", "img_size", "crop_pct", "interpolation")


@dataclass(frozen=True)
class Report:
    """An evaluation and what was evaluated."""

    model: str
    dataset: str
    evaluation: Evaluation
    parameters: int
    config: dict[str, Any]
    class_names: list[str]
    bad_images: int

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "model": self.model,
            "dataset": self.dataset,
            "top1": self.evaluation.top1,
            "top5": self.evaluation.top5,
            "loss": self.evaluation.loss,
            "images": self.evaluation.images,
            "bad_images": self.bad_images,
            "param_count": self.parameters,
            "img_size": self.config["input_size"][-1],
            "worst_classes": self.evaluation.worst_classes(self.class_names),
        }

    def as_row(self) -> dict[str, Any]:
        """A row of timm's results CSV: percent to 3 decimals, parameters in millions."""
        top1, top5 = round(self.evaluation.top1, 3), round(self.evaluation.top5, 3)
        values = (
            self.model,
            top1,
            round(100 - top1, 3),
            top5,
            round(100 - top5, 3),
            round(self.parameters / 1e6, 2),
            self.config["input_size"][-1],
            round(self.config["crop_pct"], 3),
            self.config["interpolation"],
        )
        return dict(zip(COLUMNS, values, strict=True))


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


def load_model(source: str, device: torch.device) -> Any:
    """A trained model in eval mode: a run directory, ``hf-hub:``/``local-dir:``, or a name with pretrained weights.

    Raises:
        UserError: there is no such run or model, or its weights cannot be read.
    """
    return create_model(resolve_source(source), zoo_only=False, pretrained=True).to(device).eval()


def evaluate_checkpoint(
    source: str,
    dataset: str | None = None,
    *,
    data_dir: Path | None = None,
    batch_size: int = 256,
    workers: int = 0,
    device: str | None = None,
    amp: bool = False,
    on_bad_image: BadImagePolicy = "fail",
) -> Report:
    """Accuracy of a checkpoint on the validation split of a data set; without one, on what the run was trained on.

    Raises:
        UserError: model or data cannot be had, or do not fit each other.
    """
    resolve_source(source)
    if dataset is None:
        dataset, data_dir = _trained_on(source, data_dir)
    data = open_dataset(dataset, "val", data_dir=data_dir)
    where = choose_device(device)
    model = load_model(source, where)
    if model.num_classes < data.num_classes:
        raise UserError(
            f"{source} tells {model.num_classes} classes apart, data set {dataset} has {data.num_classes}: "
            "fine-tune the model on it first"
        )
    config = resolve_model_data_config(model)
    check_image_size(model, source, config["input_size"][-1])
    loader = create_loader(
        data,
        batch_size=min(batch_size, len(data)),
        train=False,
        input_size=config["input_size"],
        mean=config["mean"],
        std=config["std"],
        augmentation=Augmentation(interpolation=config["interpolation"], crop_pct=config["crop_pct"]),
        workers=workers,
        on_bad_image=on_bad_image,
    )

    def predict(images: torch.Tensor) -> torch.Tensor:
        with torch.autocast(where.type, torch.bfloat16, enabled=amp):
            return model(images)

    result = evaluate(predict, loader, model.num_classes, where)
    parameters = sum(p.numel() for p in model.parameters())
    names = _class_names(data, model.num_classes)
    return Report(source, dataset, result, parameters, config, names, len(data.bad_images))


def write_results(path: Path, reports: list[Report]) -> None:
    """Writes timm's results CSV.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(report.as_row() for report in reports)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def _trained_on(source: str, data_dir: Path | None) -> tuple[str, Path | None]:
    recipe_file = Path(source) / "recipe.yaml"
    if not recipe_file.is_file():
        raise UserError(f"say which data set to evaluate {source} on: --dataset digits, shapes, cifar10, folder, ...")
    recipe = load_recipe(str(recipe_file))
    return recipe.dataset, data_dir or recipe.data_dir


def _class_names(data: ImageDataset, count: int) -> list[str]:
    return [*data.class_names, *(f"class {i}" for i in range(len(data.class_names), count))]
