"""Many image files at once: folders and wildcards in, a table and features out."""

from __future__ import annotations

import csv
import glob
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, TextIO

import torch
from safetensors.torch import save_file
from timm.utils.misc import natural_key

from petra_zoo.data.image_folder import find_images
from petra_zoo.errors import UserError
from petra_zoo.evaluation.prediction import ImagePrediction, PredictionOptions, Seen, look_at
from petra_zoo.files import check_writable
from petra_zoo.strict_json import to_json

_KINDS = (".csv", ".jsonl")


class Written(NamedTuple):
    """How many images were classified, and how many could not be read."""

    images: int
    bad_images: int


def find_image_files(places: Sequence[Path]) -> list[Path]:
    """Files as they are, the images in folders at any depth, and what matches wildcards (``**`` for any folders).

    Raises:
        UserError: a folder has no images, there is no such file, or nothing matches.
    """
    return [file for place in places for file in _files_at(place)]


def write_predictions(
    source: str,
    images: Sequence[Path],
    *,
    output: Path | None = None,
    features: Path | None = None,
    options: PredictionOptions | None = None,
) -> Written:
    """Classifies image files, and writes each as soon as it is done.

    Args:
        source: of the model; see `look_at`.
        images: the files.
        output: a CSV (image, then label and probability of each class) or JSON lines, by its ending.
        features: a safetensors file of `features`, float32 [images, features]: what the classifier reads. The names of
            the images are in its metadata, under `images`, as a JSON list in the same order.
        options: how.

    Raises:
        UserError: see `look_at`; or a file cannot be written. What was classified before is in `output`.
    """
    options = replace(options or PredictionOptions(), features=features is not None)
    if output is not None and output.suffix not in _KINDS:
        raise UserError(f"cannot write {output}: expected a name that ends in {' or '.join(_KINDS)}")
    for path in filter(None, (output, features)):
        check_writable(path)
    kept: list[Seen] = []
    count = 0
    for seen in _written(look_at(source, images, options), output):
        count += 1
        if features is not None:
            kept.append(seen)
    if features is not None:
        _save_features(source, kept, features)
    return Written(count, len(images) - count)


def _files_at(place: Path) -> list[Path]:
    if place.is_dir():
        files, _ = find_images(place)
        if not files:
            raise UserError(f"there is no image in {place}")
        return [Path(file) for file in files]
    if place.exists():
        return [place]
    if not glob.has_magic(str(place)):  # said before any other image is looked at
        raise UserError(f"{place} cannot be read as an image: No such file or directory")
    found = sorted(glob.glob(str(place), recursive=True), key=natural_key)
    if not found:
        raise UserError(f"nothing matches {place}")
    return [Path(file) for file in found if not Path(file).is_dir()]


def _written(found: Iterable[Seen], output: Path | None) -> Iterator[Seen]:
    """The same, each written before the next is asked for."""
    if output is None:
        yield from found
        return
    write = _write_csv if output.suffix == ".csv" else _write_lines
    try:
        with output.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            yield from write(found, file)
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror}") from error


def _write_csv(found: Iterable[Seen], file: TextIO) -> Iterator[Seen]:
    writer = csv.writer(file)
    for number, seen in enumerate(found):
        guesses = seen.prediction.guesses
        if number == 0:
            ends = ["", *(f"_{place}" for place in range(2, len(guesses) + 1))]
            writer.writerow(["image", *(f"{word}{end}" for end in ends for word in ("label", "probability"))])
        values = [value for guess in guesses for value in (guess.label, f"{guess.probability:.6g}")]
        writer.writerow([seen.prediction.image, *values])
        yield seen


def _write_lines(found: Iterable[Seen], file: TextIO) -> Iterator[Seen]:
    for seen in found:
        file.write(to_json(seen.prediction.as_dict()) + "\n")
        yield seen


def _save_features(source: str, found: Sequence[Seen], path: Path) -> None:
    predictions: list[ImagePrediction] = [seen.prediction for seen in found]
    rows = [seen.features for seen in found if seen.features is not None]
    names = to_json([prediction.image for prediction in predictions])
    try:
        save_file({"features": torch.stack(rows)}, path, {"images": names, "model": source})
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
