"""How fast a trained network answers: its eval path eagerly, compiled, and as an ONNX file, in turn."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Literal

import torch
from torch import Tensor

from petra_zoo.checkpoints.load import FROM_A_CONFIG, create_any_model, load_model, run_path, set_image_size
from petra_zoo.data.preprocessing import Preprocessing
from petra_zoo.device import choose_device, computing, require_compiler
from petra_zoo.errors import UserError
from petra_zoo.evaluation.export import export_loaded
from petra_zoo.evaluation.onnx_files import OnnxModel, check_packages
from petra_zoo.evaluation.watch import is_out_of_memory
from petra_zoo.models.classifier import Classifier
from petra_zoo.progress import tracked
from petra_zoo.strict_json import JsonObject

InferenceWay = Literal["eager", "compiled", "onnx"]
INFERENCE_WAYS: tuple[InferenceWay, ...] = ("eager", "compiled", "onnx")
_WARM_UP = 3  # calls that choose kernels and fill caches


@dataclass(frozen=True)
class TimingOptions:
    """How to measure.

    Attributes:
        ways: in which the network runs.
        batch_sizes: images at a time.
        image_size: height and width; None: the model's own.
        device: ``cpu`` or ``cuda``; None: the GPU where there is one. ONNX files run on the CPU.
        amp: bfloat16 autocast, except in ONNX files.
        repeats: timed calls of each way and batch size, all ways in turn.
    """

    ways: Sequence[InferenceWay] = ("eager",)
    batch_sizes: Sequence[int] = (1, 32)
    image_size: tuple[int, int] | None = None
    device: str | None = None
    amp: bool = False
    repeats: int = 20


@dataclass(frozen=True)
class InferenceSpeed:
    """One way, with batches of one size.

    Attributes:
        milliseconds: of a batch, the median of all repeats.
        fastest, slowest: the shortest and the longest of them.
        images_per_second: at the median.
    """

    model: str
    way: InferenceWay
    batch_size: int
    milliseconds: float
    fastest: float
    slowest: float
    images_per_second: float

    def as_dict(self) -> JsonObject:
        """For JSON."""
        return asdict(self)


def time_inference(source: str, options: TimingOptions | None = None) -> list[InferenceSpeed]:
    """Times a network's answers to random images that lie on its device, normalised.

    Args:
        source: a run directory, ``hf-hub:``/``local-dir:``, or a model's name, whose weights are then not needed.
        options: how; default: see `TimingOptions`.

    Raises:
        UserError: the model cannot be had, does not take the images, or a way is not there.
    """
    options = options or TimingOptions()
    device = choose_device(options.device)
    if "onnx" in options.ways:
        check_packages("--way onnx")
        if device.type != "cpu" or options.amp:
            raise UserError("--way onnx is measured on the CPU in float32: add --device cpu, or leave it out")
    trained = run_path(source).is_dir() or source.startswith(FROM_A_CONFIG)
    if "compiled" in options.ways:
        require_compiler(device)
    model = (load_model(source, device) if trained else create_any_model(source).to(device)).eval()
    if options.image_size:
        set_image_size(model, source, *options.image_size)
    channels, *own = Preprocessing.of(model).input_size
    height, width = options.image_size or own
    with tempfile.TemporaryDirectory() as folder, torch.no_grad(), computing(device):
        calls = {way: _call(way, model, source, (height, width), Path(folder), options.amp) for way in options.ways}
        sizes = {n: torch.randn(n, channels, height, width, device=device) for n in options.batch_sizes}
        times = _times(calls, sizes, options.repeats, device)
    return [_speed(source, way, n, times[way, n]) for way in options.ways for n in options.batch_sizes]


def _call(
    way: InferenceWay, model: Classifier, source: str, size: tuple[int, int], folder: Path, amp: bool
) -> Callable[[Tensor], Tensor]:
    if way == "onnx":
        path = folder / "model.onnx"
        export_loaded(model, source, path, size, dynamic=["batch"])
        return OnnxModel(path, threads=torch.get_num_threads())
    run = torch.compile(model) if way == "compiled" else model

    def call(images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=amp):
            found: Tensor = run(images)
            return found

    return call


def _times(
    calls: dict[InferenceWay, Callable[[Tensor], Tensor]], sizes: dict[int, Tensor], repeats: int, device: torch.device
) -> dict[tuple[InferenceWay, int], list[float]]:
    """Seconds of every repeat, all ways and sizes in turn: what else the machine does falls on all of them alike."""
    times: dict[tuple[InferenceWay, int], list[float]] = {(way, n): [] for way in calls for n in sizes}
    for repeat in tracked(range(repeats + _WARM_UP), "measuring", repeats + _WARM_UP):
        for way, n in times:
            _wait(device)
            start = time.perf_counter()
            try:
                calls[way](sizes[n])
                _wait(device)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                raise UserError(
                    f"out of memory with a batch size of {n} ({way}): use a smaller --batch-size"
                ) from error
            if repeat >= _WARM_UP:
                times[way, n].append(time.perf_counter() - start)
    return times


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


def _speed(source: str, way: InferenceWay, batch_size: int, seconds: list[float]) -> InferenceSpeed:
    middle = median(seconds)
    return InferenceSpeed(
        source, way, batch_size, 1e3 * middle, 1e3 * min(seconds), 1e3 * max(seconds), batch_size / middle
    )
