"""From a source's name to a directory with the converted network: what `petra-zoo convert` does."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from petra_zoo.errors import UserError
from petra_zoo.training.build import check_image_size

from .calibration import open_images
from .choose import Purpose, Run, measure
from .convert import convert, noise
from .report import Fidelity, compare
from .save import check_output, save_converted
from .source import load_source, name_of


@dataclass(frozen=True)
class Conversion:
    """What was converted into what.

    Attributes:
        architecture: the name under which timm rebuilds the network.
        calibration_images: how many images the batch-norm statistics were estimated on; 0: they are the source's.
        runs: coupling, anchors and reconstruction error of each layer's run, on validation images or noise.
        fidelity: the comparison with the source; None without calibration images.
    """

    source: str
    output: Path
    architecture: str
    calibration_images: int
    runs: list[Run]
    fidelity: Fidelity | None


def convert_checkpoint(
    source: str,
    output: Path,
    *,
    architecture: str | None = None,
    coupling: Literal["auto"] | Sequence[float] = "auto",
    purpose: Purpose = "one-device",
    tolerance: float = 1e-4,
    dataset: str | None = None,
    data_dir: Path | None = None,
    calibration_images: int = 1024,
    report: Path | None = None,
) -> Conversion:
    """Loads, converts, compares and saves.

    Args:
        source: see `load_source`; `architecture` is that of a file of weights.
        output: the directory to write, absent or empty.
        coupling: see `convert`, like `purpose` and `tolerance`.
        dataset: training images calibrate, validation images compare (their labels count where the data set has as
            many classes as the network).
        data_dir: where its files are.
        calibration_images: how many of each at most.
        report: a JSON file to write the comparison to; needs `dataset`.

    Raises:
        UserError: anything in the way; then nothing is written.
    """
    check_output(output)
    if report is not None and dataset is None:
        raise UserError("--report compares predictions on images: add --calibrate DATASET, such as --calibrate digits")
    network: Any = load_source(source, architecture)
    calibration: Iterator[Tensor] | None = None
    seen = 0
    if dataset is not None:
        loader = open_images(network, dataset, "train", calibration_images, data_dir)
        check_image_size(network, source, network.pretrained_cfg["input_size"][-1])
        calibration = (images for images, _ in loader)
        seen = len(loader.dataset)
    model = convert(
        network,
        coupling=coupling if coupling == "auto" or len(coupling) > 1 else coupling[0],
        purpose=purpose,
        tolerance=tolerance,
        calibration=calibration,
    )
    fidelity = None
    if dataset is not None:
        compared = open_images(network, dataset, "val", calibration_images, data_dir)
        labelled = compared.dataset.num_classes == network.num_classes
        fidelity = compare(network, model, compared if labelled else (images for images, _ in compared))
    runs = fidelity.runs if fidelity else measure(model, noise(model))
    if not any(run.g > 0.0 for run in runs):
        seen = 0  # the source's own statistics are right
    save_converted(model, output)
    if report is not None and fidelity is not None:
        content = {"source": source, "output": str(output), "dataset": dataset, **fidelity.as_dict()}
        try:
            report.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"saved {output}, but cannot write {report}: {error.strerror}") from error
    return Conversion(source, output, name_of(model), seen, runs, fidelity)
