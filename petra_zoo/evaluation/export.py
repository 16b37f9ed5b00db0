"""The eval path of a model as ONNX or as a torch.export program, checked against the model before it is kept."""

from __future__ import annotations

import importlib.util
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from petra_zoo.checkpoints.load import check_image_size, load_model
from petra_zoo.data.labels import names_of
from petra_zoo.data.preprocessing import Preprocessing
from petra_zoo.errors import UserError
from petra_zoo.models.classifier import Classifier
from petra_zoo.strict_json import JsonObject, to_json

Format = Literal["onnx", "torch-export"]
_ROUNDING = 1e-4  # of the largest logit: float32 in another order of operations stays well below


@dataclass(frozen=True)
class Export:
    """What was written.

    Attributes:
        input_size: [C, H, W] of an image.
        error: largest difference between its logits and the model's, relative to the largest logit.
    """

    path: Path
    input_size: tuple[int, int, int]
    dynamic_batch: bool
    error: float


def export_model(
    source: str,
    output: Path,
    *,
    format: Format = "onnx",
    image_size: tuple[int, int] | None = None,
    dynamic_batch: bool = False,
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
        dynamic_batch: take any number of images at a time, instead of one.
        force: overwrite an existing file.

    Raises:
        UserError: the model cannot be had, packages are missing, the file exists or cannot be written, or computes
            something else than the model.
    """
    if format == "onnx":
        _check_packages()
    if not output.parent.is_dir():
        raise UserError(f"cannot write {output}: there is no directory {output.parent}")
    if output.is_file() and not force:
        raise UserError(f"{output} exists; choose another name, or overwrite it with --force")
    model = load_model(source, torch.device("cpu"))
    channels, *size = Preprocessing.of(model).input_size
    height, width = image_size or size
    described = _description(model, (channels, height, width))
    check_image_size(model, source, min(height, width))
    images = torch.randn(2 if dynamic_batch else 1, channels, height, width, generator=torch.Generator().manual_seed(0))
    trials = [images, images.repeat(3, 1, 1, 1).flip(2)] if dynamic_batch else [images]
    with torch.no_grad():
        # Before tracing: an eager forward reads the couplings, which a trace takes as constants.
        expected = [model(x) for x in trials]
    try:
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as folder:
            new = Path(folder) / "model"
            write = _write_onnx if format == "onnx" else _write_program
            with _quiet():
                try:
                    write(model, images, dynamic_batch, described, new)
                except (RuntimeError, TypeError, ValueError) as problem:  # what torch's exporters raise
                    reason = str(problem).strip().splitlines()[0]
                    raise UserError(f"{source} cannot be written as {format}: {reason}") from problem
            run = _run_onnx if format == "onnx" else _run_program
            with _quiet():
                error = max(_difference(y, run(new, x)) for x, y in zip(trials, expected, strict=True))
            if not error <= _ROUNDING:  # also where it is nan
                raise UserError(
                    f"the {format} file of {source} differs from the model by {error:.1e} of the largest logit "
                    f"(at most {_ROUNDING:.0e} is rounding): {output} was not written"
                )
            os.replace(new, output)
    except OSError as problem:
        raise UserError(f"cannot write {output}: {problem.strerror or problem}") from problem
    return Export(output, (channels, height, width), dynamic_batch, error)


def _check_packages() -> None:
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"--format onnx needs {', '.join(missing)}: pip install 'petra-zoo[export]'")


def _description(model: Classifier, input_size: tuple[int, int, int]) -> dict[str, str]:
    """What whoever runs the file has to know: how images become its input, and what its outputs are called."""
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
    return {key: value if isinstance(value, str) else to_json(value) for key, value in values.items()}


def _write_onnx(model: nn.Module, images: Tensor, dynamic_batch: bool, description: dict[str, str], path: Path) -> None:
    torch.onnx.export(
        model,
        (images,),
        str(path),
        input_names=["images"],
        output_names=["logits"],
        dynamo=True,
        external_data=False,  # one file
        dynamic_shapes=_dynamic(dynamic_batch),
        verbose=False,
    )
    import onnx

    written = onnx.load(path)
    onnx.helper.set_model_props(written, description)
    onnx.save(written, path)


def _write_program(
    model: nn.Module, images: Tensor, dynamic_batch: bool, description: dict[str, str], path: Path
) -> None:
    program = torch.export.export(model, (images,), dynamic_shapes=_dynamic(dynamic_batch))
    with path.open("wb") as file:  # given a path, torch wants it to end in .pt2
        torch.export.save(program, file, extra_files=description)


def _dynamic(dynamic_batch: bool) -> tuple[dict[int, torch.export.Dim]] | None:
    return ({0: torch.export.Dim("batch", min=1)},) if dynamic_batch else None


def _run_onnx(path: Path, images: Tensor) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


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
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript")]
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
