"""Evaluating a saved run, a checkpoint or a named model on a data set, with the preprocessing that travels with it."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from petra_zoo.checkpoints.load import check_image_size, load_model, resolve_source, run_path
from petra_zoo.checkpoints.provenance import sha256
from petra_zoo.data.batch_transform import BatchTransform
from petra_zoo.data.datasets import ImageDataset, open_dataset
from petra_zoo.data.labels import all_named, classes_of, names_of, shown_names
from petra_zoo.data.loader import Reading, create_loader
from petra_zoo.data.preprocessing import Preprocessing
from petra_zoo.device import choose_device
from petra_zoo.errors import Failure, UserError
from petra_zoo.evaluation.scores import Scores, evaluate
from petra_zoo.evaluation.watch import Watched, is_out_of_memory
from petra_zoo.machine import now
from petra_zoo.models.classifier import Classifier
from petra_zoo.settings.recipe_files import make_recipe, recipe_settings
from petra_zoo.settings.types import BadImagePolicy
from petra_zoo.strict_json import JsonObject

# timm's results files (validate.py --results-file), and the memory that timm does not tell
TIMM_COLUMNS = ("model", "top1", "top1_err", "top5", "top5_err", "param_count", "img_size", "crop_pct", "interpolation")
CSV_COLUMNS = (*TIMM_COLUMNS, "peak_memory_mib")


@dataclass(frozen=True)
class EvaluationReport:
    """An evaluation and what was evaluated.

    Attributes:
        batch_size: with which it went through; smaller than asked for after a retry.
        peak_memory: bytes of weights, images and activations at once, for that batch size: what CUDA allocated at most,
            or, on the CPU, the live tensors of the first batch.
        class_names: of the model's classes, which predictions and labels count.
        predictions: the best class of every image that counted, in the data set's order [images].
        labels: of these images.
        fingerprints: of these images as they were decoded; none where they were not asked for.
        weights_sha256: of model.safetensors where the source is a directory.
    """

    model: str
    dataset: str
    evaluation: Scores
    parameters: int
    preprocessing: Preprocessing
    class_names: list[str]
    bad_images: int
    batch_size: int
    peak_memory: int
    predictions: Tensor
    labels: Tensor
    fingerprints: list[bytes]
    weights_sha256: str | None
    date: str

    def as_dict(self) -> JsonObject:
        """For JSON; saved as evaluation.json in the directory, it is what `petra-zoo push` puts on the card."""
        return {
            "model": self.model,
            "dataset": self.dataset,
            "split": "val",
            "top1": self.evaluation.top1,
            "top5": self.evaluation.top5,
            "loss": self.evaluation.loss,
            "images": self.evaluation.images,
            "bad_images": self.bad_images,
            "param_count": self.parameters,
            "img_size": self.preprocessing.input_size[-1],
            "batch_size": self.batch_size,
            "peak_memory": self.peak_memory,
            "worst_classes": self.evaluation.worst_classes(self.class_names),
            "date": self.date,
            "weights_sha256": self.weights_sha256,
        }

    def as_row(self) -> dict[str, str | float]:
        """A row of timm's results CSV: percent to 3 decimals, parameters in millions."""
        top1, top5 = round(self.evaluation.top1, 3), round(self.evaluation.top5, 3)
        values = (
            self.model,
            top1,
            round(100 - top1, 3),
            top5,
            round(100 - top5, 3),
            round(self.parameters / 1e6, 2),
            self.preprocessing.input_size[-1],
            round(self.preprocessing.crop_pct, 3),
            self.preprocessing.interpolation,
            round(self.peak_memory / 2**20, 2),
        )
        return dict(zip(CSV_COLUMNS, values, strict=True))


@dataclass(frozen=True)
class EvaluationOptions:
    """How to evaluate; nothing here changes what is evaluated.

    Attributes:
        batch_size: images at a time; fewer where there are fewer.
        retry: where memory runs out, start again with half the batch size.
        workers: processes that read images; 0: this one.
        device: ``cpu`` or ``cuda``; None: the GPU where there is one.
        amp: bfloat16 autocast.
        on_bad_image: `skip` leaves out what cannot be read; `fail` raises.
        use_train_size: like timm's option, go by the checkpoint's `input_size` and `crop_pct` even where it has a
            `test_input_size` or `test_crop_pct`.
        fingerprints: keep what `compare` needs of every image.
    """

    batch_size: int = 256
    retry: bool = False
    workers: int = 0
    device: str | None = None
    amp: bool = False
    on_bad_image: BadImagePolicy = "fail"
    use_train_size: bool = False
    fingerprints: bool = False


def evaluate_checkpoint(
    source: str,
    dataset: str | None = None,
    *,
    data_dir: Path | None = None,
    cache_dir: Path | None = None,
    options: EvaluationOptions | None = None,
) -> EvaluationReport:
    """Accuracy of a checkpoint on the validation split of a data set; without one, on what the run was trained on.

    Labels are matched by name where checkpoint and data have names (`petra_zoo.data.labels`). Data with a part of
    the checkpoint's classes is evaluated without telling the model which part: it may answer with any class it knows.

    Args:
        source: see `load_model`.
        dataset: see `open_dataset`.
        data_dir: where its files are.
        cache_dir: where what comes from the Hub is kept; default: HF_HUB_CACHE.
        options: how; default: see `EvaluationOptions`.

    Raises:
        UserError: model or data cannot be had, do not fit each other, or need more memory than there is.
        Failure: the model's logits are not finite.
    """
    options = options or EvaluationOptions()
    resolve_source(source)
    split_name = None
    if dataset is None:
        dataset, data_dir, split_name = _trained_on(str(run_path(source)), data_dir)
    data = open_dataset(dataset, "val", data_dir=data_dir, split_name=split_name)
    model = load_model(source, choose_device(options.device), cache_dir)
    class_names = _number_as_the_model(data, model, source, f"data set {dataset}")
    preprocessing = Preprocessing.of(model, use_test_size=not options.use_train_size)
    check_image_size(model, source, preprocessing.input_size[-1])
    measured = _measure(model, source, data, preprocessing, options)
    if not math.isfinite(measured.scores.loss):  # its best classes would be those of argmax over numbers that are none
        raise Failure(f"{source} gives logits on {dataset} that are not finite: its training has diverged")
    weights = run_path(source) / "model.safetensors"
    labels = torch.cat(measured.watched.labels)
    counted = labels >= 0
    decoded = zip(measured.fingerprints, counted.tolist(), strict=True) if options.fingerprints else ()
    return EvaluationReport(
        model=source,
        dataset=dataset,
        evaluation=measured.scores,
        parameters=sum(p.numel() for p in model.parameters()),
        preprocessing=preprocessing,
        class_names=class_names,
        bad_images=len(data.bad_images),
        batch_size=measured.batch_size,
        peak_memory=measured.watched.peak_memory(),
        predictions=torch.cat(measured.watched.predictions)[counted],
        labels=labels[counted],
        fingerprints=[fingerprint for fingerprint, counts in decoded if counts],
        weights_sha256=sha256(weights) if weights.is_file() else None,
        date=now(),
    )


def evaluate_checkpoints(
    sources: Sequence[str],
    dataset: str | None = None,
    *,
    results_file: Path | None = None,
    data_dir: Path | None = None,
    cache_dir: Path | None = None,
    options: EvaluationOptions | None = None,
) -> Iterator[EvaluationReport]:
    """One checkpoint after the other, as they are done; the results file is written anew after each.

    Args:
        sources: see `load_model`; all are looked for before the first is evaluated.
        results_file: a CSV, see `write_results`.
        dataset, data_dir, cache_dir, options: see `evaluate_checkpoint`.

    Raises:
        UserError: see `evaluate_checkpoint`; what was evaluated before is in the results file.
    """
    for source in sources:
        resolve_source(source)
    reports: list[EvaluationReport] = []
    for source in sources:
        reports.append(evaluate_checkpoint(source, dataset, data_dir=data_dir, cache_dir=cache_dir, options=options))
        if results_file is not None:
            write_results(results_file, reports)
        yield reports[-1]


def write_results(path: Path, reports: list[EvaluationReport]) -> None:
    """Writes timm's results CSV.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, CSV_COLUMNS)
            writer.writeheader()
            writer.writerows(report.as_row() for report in reports)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


class _Measured(NamedTuple):
    scores: Scores
    watched: Watched
    batch_size: int
    fingerprints: list[bytes]


def _measure(
    model: Classifier, source: str, data: ImageDataset, preprocessing: Preprocessing, options: EvaluationOptions
) -> _Measured:
    """Goes through the data once, with the largest batches that fit where `retry` is asked for."""
    device = next(model.parameters()).device
    transform = BatchTransform(preprocessing, device)
    batch_size = min(options.batch_size, len(data))
    while True:
        reading = Reading(options.workers, options.on_bad_image, leave_out=True, fingerprints=options.fingerprints)
        loader = create_loader(data, preprocessing, batch_size=batch_size, reading=reading)
        watched = Watched(model, device, options.amp, transform)
        try:
            batches = watched.labelled((images, labels) for (images,), labels in loader.read())
            scores = evaluate(watched.predict, batches, model.num_classes, device)
            return _Measured(scores, watched, batch_size, loader.fingerprints)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if not options.retry or batch_size == 1:
                fix = "use a smaller --batch-size, or --retry to find one" if batch_size > 1 else "use a larger device"
                raise UserError(f"{source}: out of memory with a batch size of {batch_size}: {fix}") from error
            batch_size //= 2
            del watched, loader, batches  # what they hold is what is missing
        torch.cuda.empty_cache()  # outside the handler, which keeps the failed step's tensors alive


def _trained_on(source: str, data_dir: Path | None) -> tuple[str, Path | None, str | None]:
    recipe_file = Path(source) / "recipe.yaml"
    if not recipe_file.is_file():
        raise UserError(f"say which data set to evaluate {source} on: --dataset digits, shapes, cifar10, folder, ...")
    # Of the data alone: the run's method or loss may be of a module that is not at hand.
    settings = recipe_settings(str(recipe_file))
    recipe = make_recipe(
        {key: settings[key] for key in ("model", "dataset", "data_dir", "val_split") if key in settings}
    )
    return recipe.dataset, data_dir or recipe.data_dir, recipe.val_split


def _number_as_the_model(data: ImageDataset, model: Classifier, source: str, name: str) -> list[str]:
    """Numbers the data's classes as the model does, by their names; gives the names of the model's classes."""
    shown = shown_names(model)
    classes = classes_of(model, source, data.class_names, data.named, name)
    if classes is not None:
        data.number_as(classes, shown)
    elif model.num_classes < data.num_classes:
        raise UserError(
            f"{source} tells {model.num_classes} classes apart, {name} has {data.num_classes}: "
            "fine-tune the model on it first"
        )
    elif names_of(model) is None:
        return all_named(data.class_names, model.num_classes)
    return shown
