"""Where a run's weights come from: environment.json (machine, versions, time, memory) and evaluation.json (measured).

The model card that `petra-zoo push` writes takes its facts from these two files.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from petra_zoo.training.evaluation import Evaluation
from petra_zoo.training.recipe import Recipe

if TYPE_CHECKING:
    from petra_zoo.training.train import Result

ENVIRONMENT, EVALUATION = "environment.json", "evaluation.json"
PACKAGES = ("petra-zoo", "torch", "torchvision", "timm", "numpy")


def recorded(train: Callable[..., Result]) -> Callable[..., Result]:
    """Makes a training function leave both files in the run directory; of several processes, the first writes."""

    @functools.wraps(train)
    def train_and_record(recipe: Recipe, *args: Any, **kwargs: Any) -> Result:
        started = time.perf_counter()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        result = train(recipe, *args, **kwargs)
        if os.environ.get("RANK", "0") == "0":
            seconds = {"wall_seconds": time.perf_counter() - started, "training_seconds": result.training_seconds}
            write_json(result.path / ENVIRONMENT, {**describe_environment(), **seconds, **peak_memory()})
            weights = result.path / "model.safetensors"
            write_json(result.path / EVALUATION, evaluation_record(recipe.dataset, result.evaluation, weights))
        return result

    return train_and_record


def describe_environment() -> dict[str, Any]:
    """The machine, its devices and the versions of what runs on it."""
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
        "system": platform.system(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "devices": devices,
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
    }


def peak_memory() -> dict[str, Any]:
    """Most bytes at once so far: what torch allocated on the GPU, or this process's resident set."""
    if torch.cuda.is_available():
        return {"peak_memory": torch.cuda.max_memory_allocated(), "peak_memory_is": "allocated on one GPU"}
    try:
        import resource
    except ImportError:  # Windows
        return {}
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"peak_memory": peak, "peak_memory_is": "resident set of one process"}


def evaluation_record(dataset: str, evaluation: Evaluation, weights: Path) -> dict[str, Any]:
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


def now() -> str:
    """UTC, to the second, as ISO 8601 writes it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def sha256(path: Path) -> str:
    """Of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes beside, then renames: the file is complete or not there."""
    beside = path.with_name(f".{path.name}.new")
    beside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(beside, path)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
