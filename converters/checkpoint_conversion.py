"""From a source's name to a directory with the converted network: what `petra-zoo convert` does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from timm.data import resolve_model_data_config
from torch import Tensor

from petra_zoo.checkpoints.load import check_image_size, load_model
from petra_zoo.converters.back_to_resnet import to_resnet
from petra_zoo.converters.calibration import open_images
from petra_zoo.converters.checks import name_of
from petra_zoo.converters.choose import SHORT_RUN, Purpose, Run, measure
from petra_zoo.converters.conversion import convert, noise
from petra_zoo.converters.memory_report import activation_memory
from petra_zoo.converters.report import Fidelity, compare
from petra_zoo.converters.report_files import Report, check_report, write_report
from petra_zoo.converters.save import check_output, save_converted, save_for_timm
from petra_zoo.converters.source import load_source
from petra_zoo.errors import UserError


@dataclass(frozen=True)
class Conversion:
    """What was converted into what.

    Attributes:
        coupling, purpose: what was asked for.
        architecture: the name under which timm rebuilds the network.
        calibration_images: how many images the batch-norm statistics were estimated on; 0: they are the source's.
        runs: coupling, anchors and reconstruction error of each layer's run, on validation images or noise.
        fidelity: the comparison with the source; None without calibration images.
        report_files: what was written about it.
    """

    source: str
    output: Path
    coupling: Literal["auto"] | Sequence[float]
    purpose: Purpose
    architecture: str
    calibration_images: int
    runs: list[Run]
    fidelity: Fidelity | None
    report_files: list[Path]

    @property
    def reversible_blocks(self) -> int:
        """How many blocks are reconstructed in a training step; 0: the network is an ordinary ResNet."""
        return sum(run.blocks for run in self.runs if run.g > 0.0)

    def why_not(self, run: Run) -> str:
        """Why a run with coupling 0 has it."""
        if not run.blocks:
            return "its first block changes the shape, and there is no other"
        if self.coupling != "auto":
            return "as asked"
        return f"a run of {count_blocks(run.blocks)} is too short to pay on one device"

    def why_nothing(self) -> str:
        """Why no run has an inverse, and what to do about it."""
        if not any(run.blocks for run in self.runs):
            return "no layer has two blocks of one shape in a row; a deeper network has"
        if self.coupling != "auto":
            return "coupling 0 is an ordinary ResNet; --coupling auto --for petra makes every run reversible"
        return (
            f"on one device a run of up to {SHORT_RUN} blocks saves no memory over recomputing each block from its "
            "input; --for petra makes every run reversible, --coupling 0.25 (or four, one per layer) those you choose"
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "source": self.source,
            "output": str(self.output),
            "architecture": self.architecture,
            "reversible_blocks": self.reversible_blocks,
            "calibration_images": self.calibration_images,
            "runs": [asdict(run) for run in self.runs],
            "fidelity": self.fidelity.as_dict() if self.fidelity else None,
            "report_files": [str(file) for file in self.report_files],
        }


def convert_checkpoint(
    source: str,
    output: Path,
    *,
    architecture: str | None = None,
    coupling: Literal["auto"] | Sequence[float] = "auto",
    purpose: Purpose = "one-device",
    tolerance: float = 1e-4,
    exact: bool = False,
    dataset: str | None = None,
    data_dir: Path | None = None,
    calibration_images: int = 1024,
    report: Path | None = None,
) -> Conversion:
    """Loads, converts, compares and saves.

    Args:
        source: see `load_source`; `architecture` is that of a file of weights.
        output: the directory to write, absent or empty.
        coupling: see `convert`, like `purpose`, `tolerance` and `exact`.
        dataset: training images calibrate, validation images compare (their labels count where the data set has as
            many classes as the network).
        data_dir: where its files are.
        calibration_images: how many of each at most.
        report: where to write the comparison and the activation memory: a .json, .md or .png file, or a directory for
            all three; needs `dataset`.

    Raises:
        UserError: anything in the way; then nothing is written.
    """
    check_output(output)
    if report is not None:
        if dataset is None:
            raise UserError("--report compares predictions on images: add --calibrate DATASET, such as digits")
        check_report(report)
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
        exact=exact,
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
    files = []
    if report is not None and dataset is not None and fidelity is not None:
        size = resolve_model_data_config(network)["input_size"]
        memory = activation_memory(network, model, size)
        files = write_report(Report(source, str(output), dataset, tolerance, fidelity, tuple(size), memory), report)
    return Conversion(source, output, coupling, purpose, name_of(model), seen, runs, fidelity, files)


def count_blocks(number: int) -> str:
    """In words: 1 block, 2 blocks."""
    return f"{number} block{'' if number == 1 else 's'}"


def convert_back(source: str, output: Path) -> str:
    """Writes the plain timm ResNet that a reversible one with coupling 0 computes; see `to_resnet`.

    Args:
        source: what `load_model` takes: a run directory, ``hf-hub:``, ``local-dir:`` or a pretrained name.
        output: the directory to write, absent or empty.

    Returns:
        The name under which timm builds it.

    Raises:
        UserError: it is no plain ResNet, or something cannot be read or written; then nothing is written.
    """
    check_output(output)
    model = load_model(source, torch.device("cpu"))
    network = to_resnet(model)
    images = noise(model)
    with torch.no_grad():
        if not torch.equal(network(images), model(images)):
            raise UserError(f"{source}: the plain ResNet does not compute the same, nothing was written")
    save_for_timm(network, output)
    return name_of(network)
