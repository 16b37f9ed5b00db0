"""The directory of a run: recipe.yaml, metrics.jsonl, summary.csv, model.safetensors and config.json.

`provenance` adds environment.json and evaluation.json. Files that were complete stay complete: new ones are written
beside them and renamed into place.
"""

from __future__ import annotations

import copy
import csv
import os
import tempfile
from collections.abc import Mapping
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError
from timm.models import save_for_hf

from petra_zoo.checkpoints.load import LAST
from petra_zoo.checkpoints.provenance import (
    ENVIRONMENT,
    EVALUATION,
    describe_environment,
    peak_memory,
    sha256,
    write_json,
)
from petra_zoo.data.labels import all_named
from petra_zoo.data.preprocessing import Preprocessing
from petra_zoo.errors import Failure, UserError
from petra_zoo.evaluation.scores import Scores
from petra_zoo.files import apply_umask, check_free, write_whole
from petra_zoo.machine import now
from petra_zoo.models.classifier import Classifier
from petra_zoo.petra import first_not_finite
from petra_zoo.settings.recipe import Recipe
from petra_zoo.settings.recipe_files import recipe_yaml, save_recipe
from petra_zoo.strict_json import Json, JsonObject, to_json

RECIPE, MODEL = "recipe.yaml", "model.safetensors"
PROFILE = "profile.json"
SAVING = ".saving-"  # how folders begin in which a model is put together
LOGS = ("metrics.jsonl", "summary.csv")


def default_path(name: str) -> Path:
    """`runs/` + a recipe's name and the time, to the second."""
    stem = Path(name).stem if name.endswith((".yaml", ".yml")) else name.replace("/", "-")
    return Path("runs") / f"{stem}-{datetime.now():%Y%m%d-%H%M%S}"


class RunDirectory:
    """Where a run leaves its results.

    Args:
        recipe: the resolved recipe, which is saved at once.
        name: of the recipe, for the default place ``runs/NAME-TIME``.

    Raises:
        UserError: the directory holds anything, or cannot be written.
    """

    _from_other_weights = False  # and not from nothing: their licence holds for what comes of them

    def __init__(self, recipe: Recipe, name: str) -> None:
        wanted = recipe.output or default_path(name)
        self._from_other_weights = bool(recipe.pretrained)
        try:
            self.path = _claim(wanted) if recipe.output else _claim_with_suffix(wanted)
            save_recipe(_for_anywhere(recipe), self.path / RECIPE)
        except OSError as error:
            raise UserError(f"cannot write the run to {wanted}: {error.strerror}; choose another output=DIR") from error

    @classmethod
    def of(cls, path: Path, recipe: Recipe) -> Self:
        """The directory of a run that goes on; nothing in it changes before all is found to be right."""
        self = cls.__new__(cls)
        self.path, self._from_other_weights = path, bool(recipe.pretrained)
        return self

    def save_recipe(self, recipe: Recipe, folder: str = ".") -> None:
        """Writes recipe.yaml, as a whole."""
        with self._writing(RECIPE):
            write_whole(self.path / folder / RECIPE, recipe_yaml(_for_anywhere(recipe)))

    def log_sizes(self) -> dict[str, int]:
        """How many bytes the logs have; nothing of them is in a cache only."""
        sizes = {}
        for name in LOGS:
            if (path := self.path / name).exists():
                with self._writing(name):
                    _flush_to_disk(path)
                sizes[name] = path.stat().st_size
        return sizes

    def cut_logs(self, sizes: Mapping[str, int]) -> None:
        """Takes from the logs what came after they had these sizes: it comes again."""
        for name in LOGS:
            path, size = self.path / name, sizes.get(name, 0)
            if not path.exists():
                continue
            with self._writing(name):
                if size == 0:
                    path.unlink()
                elif path.stat().st_size > size:
                    os.truncate(path, size)

    def log(self, **values: Json) -> None:
        """Appends a line to metrics.jsonl; null where a number is not finite."""
        with self._writing("metrics.jsonl"), (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(to_json(values) + "\n")

    def summarize(self, row: JsonObject) -> None:
        """Appends an epoch to summary.csv, with timm's columns; an empty field where the value is None."""
        path = self.path / "summary.csv"
        with self._writing("summary.csv"):
            is_new = not path.exists()
            with path.open("a", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, row)
                if is_new:
                    writer.writeheader()
                writer.writerow(row)

    def save_model(
        self, model: Classifier, preprocessing: Preprocessing | None, class_names: list[str], folder: str = "."
    ) -> None:
        """Writes model.safetensors and config.json, which `timm.create_model('local-dir:...')` reads.

        Args:
            model: complete, on any device.
            preprocessing: that its images get; None for the architecture's.
            class_names: of the data; classes beyond are numbered.
            folder: in the run directory.

        Raises:
            Failure: a parameter or buffer is not finite; what was saved before is still there.
            UserError: the disk is full or not writable; likewise.
        """
        if (name := first_not_finite(model)) is not None:
            raise Failure(f"{name} is not finite: the model is not saved, {self.what_is_kept()}")
        if any(x.device.type != "cpu" or not x.is_contiguous() for x in model.state_dict().values()):
            model = copy.deepcopy(model).to("cpu").to(memory_format=torch.contiguous_format)  # safetensors' condition
        # Else the tag, and the sizes to test at, of other weights: the architecture's.
        others = {"tag": None, "test_input_size": None, "test_crop_pct": None}
        if not self._from_other_weights:  # whoever trained it from nothing has not chosen the architecture's licence
            others["license"] = None
        words = {"pretrained_cfg": others, "label_names": all_named(class_names, model.num_classes)}
        with self._writing(MODEL), tempfile.TemporaryDirectory(dir=self.path, prefix=SAVING) as new:
            save_for_hf(
                model,
                new,
                model_config=words,
                safe_serialization=True,
                data_config={**preprocessing.as_dict()} if preprocessing else None,
            )
            apply_umask(Path(new) / MODEL)
            (self.path / folder).mkdir(exist_ok=True)
            for name in (MODEL, "config.json"):
                _flush_to_disk(Path(new) / name)
                os.replace(Path(new) / name, self.path / folder / name)

    def model_sha256(self) -> str | None:
        """Of the run's model; None where there is none."""
        path = self.path / MODEL
        with self._writing(MODEL):
            return sha256(path) if path.exists() else None

    def set_model_aside(self) -> str:
        """Takes the run's model out of the way of another one; gives the name of the folder where it is now."""
        folder = self._aside()
        with self._writing(MODEL):
            folder.mkdir()
            for name in (MODEL, "config.json"):
                if (self.path / name).exists():
                    os.replace(self.path / name, folder / name)
        return folder.name

    def set_last_aside(self) -> str | None:
        """Takes the last model out of the way, where it is another one than the run's; gives its new name."""
        if not (self.path / LAST).is_dir():
            return None
        folder = self._aside()
        with self._writing(LAST):
            os.replace(self.path / LAST, folder)
        return folder.name

    def _aside(self) -> Path:
        return next(path for n in count(1) if not (path := self.path / f"aside-{n}").exists())

    def what_is_kept(self) -> str:
        """For messages about training that cannot go on."""
        return f"the one in {self.path} is kept" if (self.path / MODEL).exists() else "none was saved before"

    def _writing(self, name: str) -> _Writing:
        return _Writing(self.path / name)


def _for_anywhere(recipe: Recipe) -> Recipe:
    """As it is saved: run again, it gets a directory of its own, and finds the data from everywhere."""
    where = None if recipe.data_dir is None else Path(os.path.abspath(recipe.data_dir))
    return recipe.model_copy(update={"output": None, "data_dir": where})


def _claim(path: Path) -> Path:
    """Makes an absent or empty directory this run's own: of several that want it, one gets it."""
    check_free(path, "output=DIR")
    path.mkdir(parents=True, exist_ok=True)
    try:
        (path / RECIPE).touch(exist_ok=False)
    except FileExistsError:
        check_free(path, "output=DIR")
    return path


def _claim_with_suffix(path: Path) -> Path:
    """Makes a directory that nobody had: runs that start in the same second get -2, -3 and so on."""
    for number in count(1):
        own = path if number == 1 else path.with_name(f"{path.name}-{number}")
        try:
            own.mkdir(parents=True)
        except FileExistsError:
            continue
        return own
    raise AssertionError("count() does not end")


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


def record_run(
    path: Path,
    recipe: Recipe,
    evaluation: Scores,
    processes: int,
    *,
    wall_seconds: float,
    training_seconds: float,
    ended: str,
) -> None:
    """Leaves both files in a run directory whose model has just been saved; memory is that of this process.

    What was measured stands beside D_0, how many updates old the first stage's gradients were.

    Raises:
        UserError: they cannot be written.
    """
    facts: JsonObject = {"wall_seconds": wall_seconds, "training_seconds": training_seconds, "ended": ended}
    try:
        write_json(path / ENVIRONMENT, {**describe_environment(), "processes": processes, **facts, **peak_memory()})
        record = evaluation_record(recipe.dataset, evaluation, path / "model.safetensors")
        write_json(path / EVALUATION, {**record, "delay": recipe.delay[0]})
    except OSError as error:
        raise UserError(f"the model is saved, but {path} takes no more files: {error.strerror}") from error


def evaluation_record(dataset: str, evaluation: Scores, weights: Path) -> JsonObject:
    """What was measured of which weights."""
    return {
        "dataset": dataset,
        "split": "val",
        "top1": evaluation.top1,
        "top5": evaluation.top5,
        "loss": evaluation.loss,
        "images": evaluation.images,
        "date": now(),
        "weights_sha256": sha256(weights),
    }
