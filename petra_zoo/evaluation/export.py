"""The eval path of a model as ONNX or as a torch.export program, checked against the model before it is kept."""

from __future__ import annotations

import logging
import os
import tempfile
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import torch
from torch import Tensor

from petra_zoo.checkpoints.load import check_image_size, load_model
from petra_zoo.data.labels import names_of
from petra_zoo.data.preprocessing import Preprocessing
from petra_zoo.errors import UserError
from petra_zoo.evaluation.evaluation_data import DataPlace
from petra_zoo.evaluation.onnx_files import OLDEST_OPSET, OnnxModel, check_packages, write_onnx
from petra_zoo.evaluation.quantization import Int8Images, Int8Scores, quantize
from petra_zoo.models.classifier import Classifier
from petra_zoo.strict_json import JsonObject, to_json

Format = Literal["onnx", "torch-export"]
Dynamic = Literal["batch", "size"]
_AXES: dict[Dynamic, tuple[int, ...]] = {"batch": (0,), "size": (2, 3)}  # of [B, C, H, W]
_ROUNDING = 1e-4  # of the largest logit: float32 in another order of operations stays well below


@dataclass(frozen=True)
class Export:
    """What was written.

    Attributes:
        input_size: [C, H, W] of an image.
        dynamic: what of the input may be of any size.
        error: largest difference between its logits and the model's, relative to the largest logit; of the float32 file
            that an 8-bit one was made of.
        int8: an 8-bit file compared with that one.
    """

    path: Path
    input_size: tuple[int, int, int]
    dynamic: frozenset[Dynamic]
    error: float
    int8: Int8Scores | None = None

    @property
    def shape(self) -> str:
        """Of the input: `Nx3x224x224`."""
        channels, *size = map(str, self.input_size)
        any_size = ["H", "W"] if "size" in self.dynamic else size
        return "x".join(["N" if "batch" in self.dynamic else "1", channels, *any_size])

    def as_dict(self) -> JsonObject:
        """For JSON."""
        return {
            "path": str(self.path),
            "input_size": list(self.input_size),
            "dynamic": sorted(self.dynamic),
            "error": self.error,
            "int8": None if self.int8 is None else self.int8.as_dict(),
        }


def export_model(
    source: str,
    output: Path,
    *,
    format: Format = "onnx",
    image_size: tuple[int, int] | None = None,
    dynamic: Collection[Dynamic] = (),
    opset: int | None = None,
    int8: Int8Images | None = None,
    force: bool = False,
) -> Export:
    """Writes a trained model for inference: normalised images [B, C, H, W] named ``images`` -> ``logits`` [B, classes].

    The file is run (by onnxruntime, or by `torch.export.load`) and compared with the model before it takes its place;
    what was at `output` before stays until then.

    Args:
        source: a run directory, ``hf-hub:``/``local-dir:``, or a name with pretrained weights.
        output: the file; its directory must exist.
        format: ``'onnx'`` (needs the extra `export`) or ``'torch-export'`` (a .pt2 file).
        image_size: height and width; None: the model's own.
        dynamic: ``'batch'``: take any number of images at a time, instead of one; ``'size'``: of any height and width.
        opset: version of ONNX's operators, 18 or later; None: torch's own choice.
        int8: quantise an ONNX file to 8 bits, by these images; see `petra_zoo.evaluation.quantization`.
        force: overwrite an existing file.

    Raises:
        UserError: the model cannot be had, packages are missing, the file exists or cannot be written, or computes
            something else than the model.
    """
    if format == "onnx":
        check_packages("--format onnx")
        if opset is not None and opset < OLDEST_OPSET:
            raise UserError(f"--opset {opset}: expected {OLDEST_OPSET} or later")
    elif opset is not None or int8 is not None:
        raise UserError(f"--format {format} has no {'opset' if int8 is None else '8-bit numbers'}: use --format onnx")
    if not output.parent.is_dir():
        raise UserError(f"cannot write {output}: there is no directory {output.parent}")
    if output.is_file() and not force:
        raise UserError(f"{output} exists; choose another name, or overwrite it with --force")
    model = load_model(source, torch.device("cpu"))
    channels, *size = Preprocessing.of(model).input_size
    height, width = image_size or size
    check_image_size(model, source, min(height, width))
    if int8 is not None:
        place = DataPlace.of(source, int8.dataset, int8.data_dir, "--calibrate")
        place.open("train")  # which may be missing: before the work
    try:
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as folder:
            new, scores = Path(folder) / "model", None
            error = export_loaded(model, source, new, (height, width), format=format, dynamic=dynamic, opset=opset)
            if int8 is not None:
                full, new = new, Path(folder) / "quantized"
                with _quiet():
                    scores = quantize(model, source, full, new, int8, None if "batch" in dynamic else 1)
            os.replace(new, output)
    except OSError as problem:
        raise UserError(f"cannot write {output}: {problem.strerror or problem}") from problem
    return Export(output, (channels, height, width), frozenset(dynamic), error, scores)


def export_loaded(
    model: Classifier,
    source: str,
    path: Path,
    image_size: tuple[int, int],
    *,
    format: Format = "onnx",
    dynamic: Collection[Dynamic] = (),
    opset: int | None = None,
) -> float:
    """Writes a model that is at hand, and gives the largest difference from it, relative to the largest logit.

    Args:
        model: in eval mode, on the CPU.
        source: what it is called.
        path: the file.
        image_size: height and width.
        format, dynamic, opset: see `export_model`.

    Raises:
        UserError: it cannot be written, or computes something else than the model.
    """
    described = FileDescription.of(model, (Preprocessing.of(model).input_size[0], *image_size), dynamic, opset)
    trials = described.trials()
    with torch.no_grad():
        # Before tracing: an eager forward reads the couplings, which a trace takes as constants.
        expected = [model(x) for x in trials]
    with _quiet():
        try:
            (_write_onnx if format == "onnx" else _write_program)(model, trials[0], described, path)
        except (RuntimeError, TypeError, ValueError) as problem:  # what torch's exporters raise
            reason = str(problem).strip().splitlines()[0]
            raise UserError(f"{source} cannot be written as {format}: {reason}") from problem
        run = _run_onnx if format == "onnx" else _run_program
        try:
            error = max(_difference(y, run(path, x)) for x, y in zip(trials, expected, strict=True))
        except Exception as problem:  # an exporter's own check of sizes is an assertion, onnxruntime's its own error
            reason = str(problem).strip().splitlines()[0]
            raise UserError(
                f"the {format} file of {source} does not take what it should ({reason[:160]}): it was not kept; with "
                "--dynamic-size a larger --input-size may be one that it can be written by"
            ) from problem
    if not error <= _ROUNDING:  # also where it is nan
        raise UserError(
            f"the {format} file of {source} differs from the model by {error:.1e} of the largest logit "
            f"(at most {_ROUNDING:.0e} is rounding): it was not kept"
        )
    return error


@dataclass(frozen=True)
class FileDescription:
    """What a file is to be.

    Attributes:
        input_size: [C, H, W] of an image.
        dynamic: what of the input may be of any size.
        opset: of an ONNX file.
        metadata: what whoever runs it has to know: how images become its input, and what its outputs are called.
    """

    input_size: tuple[int, int, int]
    dynamic: Collection[Dynamic]
    opset: int | None
    metadata: dict[str, str]

    @classmethod
    def of(
        cls, model: Classifier, input_size: tuple[int, int, int], dynamic: Collection[Dynamic], opset: int | None
    ) -> Self:
        """Of a model's file."""
        how, names = Preprocessing.of(model), names_of(model)
        values: JsonObject = {
            "input_size": list(input_size),
            "mean": list(how.mean),
            "std": list(how.std),
            "interpolation": how.interpolation,
            "crop_pct": how.crop_pct,
        }
        if names is not None:
            values["label_names"] = list(names)
        metadata = {key: value if isinstance(value, str) else to_json(value) for key, value in values.items()}
        return cls(input_size, dynamic, opset, metadata)

    @property
    def dimensions(self) -> dict[int, torch.export.Dim]:
        """Those of the input that may be of any size."""
        return {i: torch.export.Dim.DYNAMIC for kind in self.dynamic for i in _AXES[kind]}

    def trials(self) -> list[Tensor]:
        """Normalised images to write the file by, and to compare by: of every size that it promises."""
        channels, height, width = self.input_size
        count = 2 if "batch" in self.dynamic else 1  # one image would make exporters take the number as constant
        images = torch.randn(count, channels, height, width, generator=torch.Generator().manual_seed(0))
        trials = [images]
        if "batch" in self.dynamic:
            trials.append(images.repeat(3, 1, 1, 1).flip(2))
        if "size" in self.dynamic:
            trials.append(torch.cat([images, images.flip(3)], dim=3)[..., : width + max(1, width // 2)])
        return trials


def _write_onnx(model: Classifier, images: Tensor, described: FileDescription, path: Path) -> None:
    write_onnx(
        model,
        images,
        path,
        dynamic=described.dimensions,
        opset=described.opset,
        description=described.metadata,
    )


def _write_program(model: Classifier, images: Tensor, described: FileDescription, path: Path) -> None:
    program = torch.export.export(model, (images,), dynamic_shapes=(described.dimensions,))
    with path.open("wb") as file:  # given a path, torch wants it to end in .pt2
        torch.export.save(program, file, extra_files=described.metadata)


def _run_onnx(path: Path, images: Tensor) -> Tensor:
    return OnnxModel(path)(images)


def _run_program(path: Path, images: Tensor) -> Tensor:
    with path.open("rb") as file, torch.no_grad():
        return torch.export.load(file).module()(images)


def _difference(expected: Tensor, found: Tensor) -> float:
    if expected.shape != found.shape:
        return float("inf")
    return float((expected - found).abs().max() / expected.abs().max().clamp_min(1e-12))


@contextmanager
def _quiet() -> Iterator[None]:
    """Exporters warn of their own internals; whether the result is right is measured afterwards."""
    loggers = [logging.getLogger(name) for name in (None, "torch.onnx", "torch.export", "onnxscript")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
