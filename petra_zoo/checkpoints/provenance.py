"""Where a run's weights come from: environment.json (machine, versions, time, memory) and evaluation.json (measured).

The model card that `petra-zoo push` writes takes its facts from these two files.
"""

from __future__ import annotations

import hashlib
import os
import platform
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import torch

from petra_zoo.files import write_whole
from petra_zoo.machine import processor
from petra_zoo.strict_json import Json, JsonObject, to_json

ENVIRONMENT, EVALUATION = "environment.json", "evaluation.json"
PACKAGES = ("petra-zoo", "torch", "torchvision", "timm", "numpy")


def describe_environment() -> JsonObject:
    """The machine, its devices and the versions of what runs on it."""
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
        "system": platform.system(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "devices": devices,
    }


def peak_memory() -> JsonObject:
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


def sha256(path: Path) -> str:
    """Of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, content: Mapping[str, Json]) -> None:
    """The file is complete or not there. Null where a number is not finite."""
    write_whole(path, to_json(content, indent=2) + "\n")
