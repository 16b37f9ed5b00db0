"""Facts about this machine and what runs on it, for records beside results. No host name, no path. Imports no torch."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path

from petra_zoo.strict_json import JsonObject

_ROOT = Path(__file__).parents[1]  # a checkout's, where the package is installed from one as it stands


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def describe_machine() -> JsonObject:
    """Processor, cores and system; the GPUs and the number of threads where torch has been imported."""
    facts: JsonObject = {
        "processor": processor(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if "torch" in sys.modules:
        import torch

        facts["threads"] = torch.get_num_threads()
        facts["devices"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return facts


@cache
def describe_versions() -> JsonObject:
    """Of Python and the packages that decide a result; the commit, where the package runs from a git checkout."""
    packages = {name: version(name) for name in ("petra-zoo", "torch", "timm")}
    commit = _commit()
    return {"python": platform.python_version(), **packages, **({"commit": commit} if commit else {})}


def now() -> str:
    """UTC, to the second, as ISO 8601 writes it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _commit() -> str | None:
    """The checkout's commit, and whether code or recipes differ from it; None where there is no checkout."""
    try:
        top, commit = _git("rev-parse", "--show-toplevel", "HEAD").split()
        if Path(top) != _ROOT.resolve():  # an environment that lies inside some other repository
            return None
        changed = _git("status", "--porcelain", "--", "petra_zoo", "converters", "recipes")
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
    return f"{commit[:12]}, changed" if changed else commit[:12]


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(_ROOT), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout
