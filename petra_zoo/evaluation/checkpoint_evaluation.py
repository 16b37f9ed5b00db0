"""Evaluating a saved run, a checkpoint or a named model on a data set, with the preprocessing that travels with it."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from petra_zoo.checkpoints.load import check_image_size, load_model, resolve_source, run_path
from petra_zoo.checkpoints.provenance import sha256
from petra_zoo.data.batch_transform import BatchTransform
from petra_zoo.data.image_dataset import ImageDataset
from petra_zoo.data.loader import Reading, create_loader
from petra_zoo.data.preprocessing import Preprocessing
from petra_zoo.device import choose_device
from petra_zoo.errors import Failure, UserError
from petra_zoo.evaluation.calibration import calibration_error
from petra_zoo.evaluation.evaluation_data import DataPlace, number_as_the_model, run_of
from petra_zoo.evaluation.scores import Scores, evaluate
from petra_zoo.evaluation.watch import Watched, is_out_of_memory
from petra_zoo.machine import now
from petra_zoo.models.classifier import Classifier
from petra_zoo.progress import tracked
from petra_zoo.settings.types import BadImagePolicy
from petra_zoo.strict_json import JsonObject

# timm's results files (validate.py --results-file), and what timm does not tell
TIMM_COLUMNS = ("model", "top1", "top1_err", "top5", "top5_err", "param_count", "img_size", "crop_pct", "interpolation")
CSV_COLUMNS = (*TIMM_COLUMNS, "peak_memory_mib", "dataset")


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
        confidences: the softmax probability of each prediction.
        indices: where these images stand in the data.
        data: they are read again from there.
        tta: whether an image's probabilities are the mean of its own and its mirror image's.
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
    confidences: Tensor
    indices: Tensor
    data: ImageDataset
    tta: bool
    fingerprints: list[bytes]
    weights_sha256: str | None
    date: str

    @property
    def calibration_error(self) -> float:
        """In percent; see the function of that name."""
        return calibration_error(self.confidences, self.predictions == self.labels)

    def as_dict(self) -> JsonObject:
        """For JSON; saved as evaluation.json in the directory, it is what `petra-zoo push` puts on the card."""
        return {
            "model": self.model,
            "dataset": self.dataset,
            "split": "val",
            "top1": self.evaluation.top1,
            "top5": self.evaluation.top5,
            "loss": self.evaluation.loss,
            "ece": self.calibration_error,
            "tta": self.tta,
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
            self.dataset,
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
        tta: average each image's probabilities with those of its mirror image; twice the work.
        progress: show a bar where it takes long and a person watches.
    """

    batch_size: int = 256
    retry: bool = False
    workers: int = 0
    device: str | None = None
    amp: bool = False
    on_bad_image: BadImagePolicy = "fail"
    use_train_size: bool = False
    fingerprints: bool = False
    tta: bool = False
    progress: bool = False


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
    place = DataPlace.of(source, dataset, data_dir)
    data = place.open("val")
    model = load_model(source, choose_device(options.device), cache_dir)
    class_names = number_as_the_model(data, model, source, f"data set {place.name}")
    preprocessing = Preprocessing.of(model, use_test_size=not options.use_train_size)
    check_image_size(model, source, preprocessing.input_size[-1])
    measured = _measure(model, source, data, preprocessing, options)
    if not math.isfinite(measured.scores.loss):  # its best classes would be those of argmax over numbers that are none
        raise Failure(f"{source} gives logits on {place.name} that are not finite: its training has diverged")
    weights = run_path(source) / "model.safetensors"
    labels = torch.cat(measured.watched.labels)
    counted = labels >= 0
    decoded = zip(measured.fingerprints, counted.tolist(), strict=True) if options.fingerprints else ()
    return EvaluationReport(
        model=source,
        dataset=place.name,
        evaluation=measured.scores,
        parameters=sum(p.numel() for p in model.parameters()),
        preprocessing=preprocessing,
        class_names=class_names,
        bad_images=len(data.bad_images),
        batch_size=measured.batch_size,
        peak_memory=measured.watched.peak_memory(),
        predictions=torch.cat(measured.watched.predictions)[counted],
        labels=labels[counted],
        confidences=torch.cat(measured.watched.confidences)[counted],
        indices=counted.nonzero().flatten(),
        data=data,
        tta=options.tta,
        fingerprints=[fingerprint for fingerprint, counts in decoded if counts],
        weights_sha256=sha256(weights) if weights.is_file() else None,
        date=now(),
    )


def evaluate_checkpoints(
    sources: Sequence[str],
    dataset: str | Sequence[str] | None = None,
    *,
    results_file: Path | None = None,
    data_dir: Path | Sequence[Path] | None = None,
    cache_dir: Path | None = None,
    options: EvaluationOptions | None = None,
) -> Iterator[EvaluationReport]:
    """One checkpoint after the other, each on all data sets, as they are done.

    Args:
        sources: see `load_model`; all are looked for before the first is evaluated.
        dataset: one or several; None: what each was trained on.
        results_file: a CSV, see `write_results`; it is written anew after each.
        data_dir: of all data sets, or one for each.
        cache_dir, options: see `evaluate_checkpoint`.

    Raises:
        UserError: see `evaluate_checkpoint`; what was evaluated before is in the results file.
    """
    places = _places(dataset, data_dir)
    for source in sources:
        resolve_source(source)
    if options and options.fingerprints and not dataset:
        _check_same_data(sources)
    reports: list[EvaluationReport] = []
    for source, (name, folder) in product(sources, places):
        reports.append(evaluate_checkpoint(source, name, data_dir=folder, cache_dir=cache_dir, options=options))
        if results_file is not None:
            write_results(results_file, reports)
        yield reports[-1]


def _places(
    dataset: str | Sequence[str] | None, data_dir: Path | Sequence[Path] | None
) -> list[tuple[str | None, Path | None]]:
    """Data sets, each with its folder."""
    names: list[str | None] = [dataset] if isinstance(dataset, str) else [*dataset] if dataset else [None]
    folders: list[Path | None] = [data_dir] if isinstance(data_dir, Path) else [*data_dir] if data_dir else [None]
    if len(folders) not in (1, len(names)):
        raise UserError(f"{len(names)} data sets, {len(folders)} data folders: give one for all, or one for each")
    return list(zip(names, folders if len(folders) == len(names) else folders * len(names), strict=True))


def _check_same_data(sources: Sequence[str]) -> None:
    """Refuses to compare, image by image, what was trained on different data sets, before an hour is spent on it."""
    names = {source: run.dataset for source in sources if (run := run_of(source)) is not None}
    if len(set(names.values())) > 1:
        trained = " and ".join(f"{source} on {name}" for source, name in names.items())
        raise UserError(f"{trained}: models are compared on the same images, name one --dataset")


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
        watched = Watched(model, device, options.amp, transform, options.tta)
        try:
            read = loader.read()
            if options.progress:
                read = tracked(read, "evaluating", len(loader))
            batches = watched.labelled((images, labels) for (images,), labels in read)
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
