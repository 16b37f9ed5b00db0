"""From a source's name to a directory with the converted network: what `petra-zoo convert` does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, Unpack

import torch
from torch import nn

from petra_zoo.checkpoints.load import check_image_size, load_model
from petra_zoo.converters.calibration import image_shape, noise
from petra_zoo.converters.conversion import TOLERANCE, ConversionOptions, convert
from petra_zoo.converters.families import family_of, name_of
from petra_zoo.converters.fidelity import Fidelity, measure_fidelity
from petra_zoo.converters.inverses import drift_of
from petra_zoo.converters.memory_report import check_saving, conversion_memory
from petra_zoo.converters.reconstruction import MEASURED_IMAGES, CoupledRun, measure_runs, measure_steps
from petra_zoo.converters.reestimation import has_statistics
from petra_zoo.converters.report import ConversionReport, check_report, write_report
from petra_zoo.converters.save import check_output, save_converted, save_for_timm
from petra_zoo.converters.source import load_source
from petra_zoo.data.calibration_images import CalibrationImages, open_images
from petra_zoo.errors import UserError
from petra_zoo.models.classifier import Classifier, config_of
from petra_zoo.models.resnet_weights import SHORT_RUN
from petra_zoo.models.training_memory import StepBytes
from petra_zoo.strict_json import JsonObject


@dataclass(frozen=True)
class Conversion:
    """What was converted into what.

    Attributes:
        kind: the class of the source.
        coupling: what was asked for.
        architecture: the name under which timm rebuilds the network.
        calibration_images: how many images the batch-norm statistics were estimated on; 0: they are the source's.
        runs: coupling, anchors and reconstruction error of each run, on validation images or noise.
        steps: how much each block of the source adds to what it gets, |B(x) - x| / |x|, by run.
        drift: how far the logits are from the source's, in parts of their size, on those images or noise.
        memory: activations per image of source and converted network, where they were measured.
        fidelity: the comparison with the source; None without calibration images.
        report_files: what was written about it.
    """

    source: str
    output: Path
    kind: str
    coupling: Literal["auto"] | float | Sequence[float]
    architecture: str
    calibration_images: int
    runs: list[CoupledRun]
    steps: dict[str, list[float]]
    drift: float
    memory: dict[str, StepBytes]
    fidelity: Fidelity | None
    report_files: list[Path]

    @property
    def reversible_blocks(self) -> int:
        """How many blocks are reconstructed in a training step; 0: the network is an ordinary one."""
        return sum(run.blocks for run in self.runs if run.g > 0.0)

    def why_not(self, run: CoupledRun) -> str:
        """Why a run with coupling 0 has it."""
        if not run.blocks:
            return "its first block changes the shape, and there is no other"
        if self.coupling != "auto":
            return "as asked"
        if run.blocks > SHORT_RUN:
            return "its blocks are not near the identity, it would drift too far from the source"
        return f"a run of {count_blocks(run.blocks)} is too short to pay on one device"

    def why_nothing(self) -> str:
        """Why no run has an inverse, and what to do about it."""
        if not any(run.blocks for run in self.runs):
            return "no layer has two blocks of one shape in a row; a deeper network has"
        if self.coupling != "auto":
            return f"coupling 0 is an ordinary {self.kind}; --coupling auto --for petra makes every run reversible"
        return (
            f"on one device a run of up to {SHORT_RUN} blocks saves no memory over recomputing each block from its "
            "input; --for petra makes every run reversible, --coupling 0.25 (or several, one per run) those you choose"
        )

    def as_dict(self) -> JsonObject:
        """For JSON."""
        return {
            "source": self.source,
            "output": str(self.output),
            "architecture": self.architecture,
            "reversible_blocks": self.reversible_blocks,
            "calibration_images": self.calibration_images,
            "runs": [asdict(run) for run in self.runs],
            "steps": self.steps,
            "drift": self.drift,
            "activation_bytes_per_image": {name: found._asdict() for name, found in self.memory.items()},
            "fidelity": self.fidelity.as_dict() if self.fidelity else None,
            "report_files": [str(file) for file in self.report_files],
        }


def convert_checkpoint(
    source: str,
    output: Path,
    *,
    architecture: str | None = None,
    images: CalibrationImages | None = None,
    report: Path | None = None,
    **options: Unpack[ConversionOptions],
) -> Conversion:
    """Loads, converts, compares and saves.

    Args:
        source: see `load_source`; `architecture` is that of a file of weights.
        output: the directory to write, absent or empty.
        images: training images calibrate, validation images compare (their labels count where the data set has as
            many classes as the network).
        report: where to write the comparison and the activation memory: a .json, .md or .png file, or a directory for
            all three; needs `images`.
        options: see `convert`.

    Raises:
        UserError: anything in the way; then nothing is written.
    """
    check_output(output)
    if report is not None:
        if images is None:
            raise UserError("--report compares predictions on images: add --calibrate DATASET, such as digits")
        check_report(report)
    network = load_source(source, architecture)
    if images is None:
        model, fidelity, seen = convert(network, **options), None, 0
        measured = noise(model)
        runs = measure_runs(model, measured)
    else:
        loader = open_images(network, images, "train")
        check_image_size(network, source, config_of(network)["input_size"][-1])
        model, seen = convert(network, calibration=(batch for batch, _ in loader), **options), len(loader.dataset)
        fidelity = _compare(network, model, images)
        runs = fidelity.runs
        measured = next(batch for batch, _ in loader)[:MEASURED_IMAGES]
    must_pay = family_of(model).largest_drift is not None
    size = image_shape(network)
    memory = conversion_memory(network, model, size) if must_pay or report is not None else {}
    if must_pay and options.get("coupling", "auto") == "auto":
        check_saving(name_of(network), memory)
    steps = measure_steps(network, measured)
    if not any(run.g > 0.0 for run in runs) or not has_statistics(model):
        seen = 0  # the source's own statistics are right
    save_converted(model, output)
    files = []
    if report is not None and images is not None and fidelity is not None:
        tolerance = options.get("tolerance", TOLERANCE)
        found = ConversionReport(source, str(output), images.dataset, tolerance, fidelity, size, memory, steps)
        files = write_report(found, report)
    return Conversion(
        source=source,
        output=output,
        kind=type(network).__name__,
        coupling=options.get("coupling", "auto"),
        architecture=name_of(model),
        calibration_images=seen,
        runs=runs,
        steps=steps,
        drift=drift_of(network, model, measured),
        memory=memory,
        fidelity=fidelity,
        report_files=files,
    )


def _compare(source: Classifier, converted: nn.Module, images: CalibrationImages) -> Fidelity:
    loader = open_images(source, images, "val")
    labelled = loader.dataset.num_classes == source.num_classes
    return measure_fidelity(source, converted, loader if labelled else (batch for batch, _ in loader))


def count_blocks(number: int) -> str:
    """In words: 1 block, 2 blocks."""
    return f"{number} block{'' if number == 1 else 's'}"


def convert_back(source: str, output: Path) -> str:
    """Writes the plain network of timm that a reversible one with coupling 0 computes; see `NetworkFamily.plain`.

    Args:
        source: what `load_model` takes: a run directory, ``hf-hub:``, ``local-dir:`` or a pretrained name.
        output: the directory to write, absent or empty.

    Returns:
        The name under which timm builds it.

    Raises:
        UserError: it computes no plain network, or something cannot be read or written; then nothing is written.
    """
    check_output(output)
    model = load_model(source, torch.device("cpu"))
    network = family_of(model).plain(model)
    images = noise(model)
    with torch.no_grad():
        if not torch.equal(network(images), model(images)):
            raise UserError(f"{source}: the plain network does not compute the same, nothing was written")
    save_for_timm(network, output)
    return name_of(network)
