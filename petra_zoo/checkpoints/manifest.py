"""manifest.json: what a checkpoint is of, and every file in it with its size and SHA-256.

Everything in here may come from a stranger: sizes are checked before anything is read, a file's name is no path, and
what is wrong is one clear line.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from petra_zoo.checkpoints.packing import CheckpointError
from petra_zoo.strict_json import Json, JsonObject, to_json

MANIFEST, SEAL = "manifest.json", "manifest.sha256"  # the second one has the hash of the first
FORMAT = 1
_LARGEST = 4 << 20  # bytes of a manifest
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*(\.[A-Za-z0-9_-]+)+")  # no folder, nothing hidden, never upwards
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class FileEntry:
    """A file: how many bytes, and their SHA-256 in hexadecimal."""

    size: int
    sha256: str

    @classmethod
    def of(cls, content: bytes) -> FileEntry:
        """Of what is about to be written."""
        return cls(len(content), hashlib.sha256(content).hexdigest())


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself.

    Attributes:
        tick: of the pipeline, how many have been run.
        epoch: in progress, from 0.
        batch: how many micro-batches of it have been fed.
        stages: units per stage.
        replicas: of the pipeline.
        threads: per process: with another number, sums come in another order.
        recipe: the resolved one.
        versions: of what ran.
        finished: whether nothing is left to train.
        metrics: of the validation at this point, where there was one: `loss`, `top1`, `top5`.
        date: when it was saved, ISO 8601.
        files: by name.
    """

    tick: int
    epoch: int
    batch: int
    stages: tuple[int, ...]
    replicas: int
    threads: int
    recipe: JsonObject
    versions: JsonObject
    finished: bool = False
    metrics: Mapping[str, float] | None = None
    date: str = ""
    files: Mapping[str, FileEntry] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(entry.size for entry in self.files.values())

    def text(self) -> str:
        """As it is written."""
        files: JsonObject = {
            name: {"bytes": entry.size, "sha256": entry.sha256} for name, entry in sorted(self.files.items())
        }
        return to_json({"format": FORMAT, **self.facts(), "files": files}, indent=1) + "\n"

    def facts(self) -> JsonObject:
        """All but the files, for people and for JSON."""
        return {
            "tick": self.tick,
            "epoch": self.epoch,
            "batch": self.batch,
            "stages": list(self.stages),
            "replicas": self.replicas,
            "threads": self.threads,
            "finished": self.finished,
            "metrics": None if self.metrics is None else dict(self.metrics),
            "date": self.date,
            "versions": self.versions,
            "recipe": self.recipe,
        }


def seal_of(content: bytes) -> bytes:
    """What manifest.sha256 says of a manifest."""
    return f"{hashlib.sha256(content).hexdigest()}\n".encode()


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint, its seal unbroken; the other files are not looked at.

    Raises:
        CheckpointError: there is none, it is damaged, or no manifest at all.
    """
    content = _read_small(folder / MANIFEST, _LARGEST)
    if _read_small(folder / SEAL, 256) != seal_of(content):
        raise CheckpointError(f"{folder / MANIFEST} is damaged: its SHA-256 is not the one in {SEAL}")
    try:
        return _parse(json.loads(content))
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{folder / MANIFEST} is no manifest: {' '.join(str(error).split())[:200]}") from error


def verify_files(folder: Path, manifest: Manifest) -> None:
    """Reads every file and compares.

    Raises:
        CheckpointError: one is missing or damaged; names it.
    """
    for name in manifest.files:
        verify_file(folder, manifest, name)


def verify_file(folder: Path, manifest: Manifest, name: str) -> Path:
    """A file whose size and content are what the manifest says.

    Raises:
        CheckpointError: they are not, or there is no such file.
    """
    if name not in manifest.files:
        raise CheckpointError(f"{folder} has no {name}: it is of another kind of run")
    path, entry = folder / name, manifest.files[name]
    found = _size(path)
    if found != entry.size:
        raise CheckpointError(f"{path} is damaged: {found:,} bytes, expected {entry.size:,}")
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if digest != entry.sha256:
        raise CheckpointError(f"{path} is damaged: its content is not what was saved (SHA-256)")
    return path


def _size(path: Path) -> int:
    """Of an ordinary file: no link, which may lead anywhere, and nothing that never ends."""
    try:
        found = os.lstat(path)
    except OSError as error:
        raise CheckpointError(f"{path} is missing" if isinstance(error, FileNotFoundError) else str(error)) from error
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(f"{path} is no ordinary file")
    return found.st_size


def _read_small(path: Path, most: int) -> bytes:
    if (size := _size(path)) > most:
        raise CheckpointError(f"{path} has {size:,} bytes, more than a checkpoint's may have ({most:,})")
    try:
        with path.open("rb") as file:
            return file.read(most)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error


def _parse(values: Json) -> Manifest:
    if not isinstance(values, dict):
        raise ValueError("expected an object")
    if values.get("format") != FORMAT:
        raise ValueError(f"format {values.get('format')!r}, this version of petra-zoo reads {FORMAT}")
    metrics = None if values["metrics"] is None else _object(values, "metrics")
    return Manifest(
        tick=_count(values, "tick"),
        epoch=_count(values, "epoch"),
        batch=_count(values, "batch"),
        stages=tuple(_count({"stages": n}, "stages") for n in _items(values, "stages")),
        replicas=_count(values, "replicas"),
        threads=_count(values, "threads"),
        recipe=_object(values, "recipe"),
        versions=_object(values, "versions"),
        finished=values["finished"] is True,
        metrics=None if metrics is None else {key: _number(metrics, key) for key in metrics},
        date=str(values["date"])[:40],
        files={name: _entry(name, entry) for name, entry in _object(values, "files").items()},
    )


def _entry(name: str, values: Json) -> FileEntry:
    if not _NAME.fullmatch(name) or len(name) > 200:
        raise ValueError(f"{name[:60]!r} is no name of a file in here")
    if not isinstance(values, dict):
        raise ValueError(f"files: {name} is {str(values)[:60]}")
    digest = values["sha256"]
    if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
        raise ValueError(f"files: {name} has the SHA-256 {str(digest)[:80]!r}")
    return FileEntry(_count(values, "bytes"), digest)


def _count(values: Mapping[str, Json], key: str) -> int:
    value = values[key]
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
        raise ValueError(f"{key} is {str(value)[:60]}, expected a whole number")
    return value


def _number(values: Mapping[str, Json], key: str) -> float:
    value = values[key]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{key} is {str(value)[:60]}, expected a number")
    return float(value)


def _object(values: Mapping[str, Json], key: str) -> JsonObject:
    value = values[key]
    if not isinstance(value, dict):
        raise ValueError(f"{key} is {str(value)[:60]}, expected an object")
    return value


def _items(values: Mapping[str, Json], key: str) -> list[Json]:
    value = values[key]
    if not isinstance(value, list):
        raise ValueError(f"{key} is {str(value)[:60]}, expected a list")
    return value
