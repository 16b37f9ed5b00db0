"""The directory of a run: recipe.yaml, metrics.jsonl, summary.csv, model.safetensors and config.json.

`provenance` adds environment.json and evaluation.json. Files that were complete stay complete: new ones are written
beside them and renamed into place.
"""

from __future__ import annotations

import copy
import csv
import json
import os
import tempfile
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from timm.models import save_for_hf

from petra_zoo.errors import UserError
from petra_zoo.training.labels import all_named
from petra_zoo.training.recipe import Recipe, save_recipe


class RunDirectory:
    """Where a run leaves its results.

    Args:
        recipe: the resolved recipe, which is saved at once.
        name: of the recipe, for the default place ``runs/NAME-TIME``.

    Raises:
        UserError: the directory holds another run or cannot be written.
    """

    def __init__(self, recipe: Recipe, name: str) -> None:
        default = f"{Path(name).stem if name.endswith(('.yaml', '.yml')) else name.replace('/', '-')}"
        self.path = recipe.output or Path("runs") / f"{default}-{datetime.now():%Y%m%d-%H%M%S}"
        if (self.path / "recipe.yaml").exists():
            raise UserError(f"{self.path} already holds a run: choose another output=DIR, or move it away")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            save_recipe(recipe, self.path / "recipe.yaml")
        except OSError as error:
            raise UserError(
                f"cannot write the run to {self.path}: {error.strerror}; choose another output=DIR"
            ) from error

    def log(self, **values: Any) -> None:
        """Appends a line to metrics.jsonl."""
        with self._writing("metrics.jsonl"), (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def summarize(self, row: dict[str, Any]) -> None:
        """Appends an epoch to summary.csv, with timm's columns."""
        path = self.path / "summary.csv"
        with self._writing("summary.csv"):
            is_new = not path.exists()
            with path.open("a", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, row)
                if is_new:
                    writer.writeheader()
                writer.writerow(row)

    def save_model(self, model: Any, data_config: dict[str, Any], class_names: list[str]) -> None:
        """Writes model.safetensors and config.json, which `timm.create_model('local-dir:...')` reads.

        Raises:
            UserError: the disk is full or not writable; what was saved before is still there.
        """
        model = copy.deepcopy(model).to("cpu", memory_format=torch.contiguous_format)  # safetensors' condition
        # Else the tag, and the sizes to test at, of other weights: the architecture's.
        others = {"tag": None, "test_input_size": None, "test_crop_pct": None}
        words = {"pretrained_cfg": others, "label_names": all_named(class_names, model.num_classes)}
        with self._writing("model.safetensors"), tempfile.TemporaryDirectory(dir=self.path, prefix=".saving-") as new:
            save_for_hf(
                model,
                new,
                model_config=words,
                safe_serialization=True,
                data_config=data_config,
            )
            for name in ("model.safetensors", "config.json"):
                _flush_to_disk(Path(new) / name)
                os.replace(Path(new) / name, self.path / name)

    def _writing(self, name: str) -> _Writing:
        return _Writing(self.path / name)


class _Writing:
    """Turns a failed write into one line that says what is still there."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, OSError | SafetensorError):
            reason = getattr(error, "strerror", None) or str(error)
            raise UserError(f"cannot write {self.path}: {reason}; what was saved before is untouched") from error


def _flush_to_disk(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())
