"""The checkpoints of a run: a folder for each, which is complete or not there.

A save writes into a folder of its own, every file to the disk and not only into a cache, then the manifest, and gives
the folder its name at the very end: a process that dies earlier leaves a folder that nobody takes for a checkpoint, and
the ones from before. Where several processes save, each writes its own files and one of them publishes.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain, count
from pathlib import Path

from petra_zoo.checkpoints.disk import Disk
from petra_zoo.checkpoints.manifest import MANIFEST, SEAL, FileEntry, Manifest, read_manifest, seal_of, verify_files
from petra_zoo.checkpoints.packing import CheckpointError
from petra_zoo.errors import UserError

CHECKPOINTS = "checkpoints"  # in a run directory
_NAMED = re.compile(r"tick-[0-9]{10}(-[0-9]{2})?")
_SAVING, _REMOVING = ".saving-", ".removing-"
LOWER_IS_BETTER = ("loss",)
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunCheckpoint:
    """A checkpoint whose manifest is sound."""

    path: Path
    manifest: Manifest


class Store:
    """Where a run keeps its checkpoints.

    Args:
        folder: RUN/checkpoints; made with the first save.
        disk: what writes.
    """

    def __init__(self, folder: Path, disk: Disk | None = None) -> None:
        self.folder, self.disk = folder, disk or Disk()

    # -- saving ---------------------------------------------------------------------------------------------------

    def begin(self, tick: int) -> Path:
        """Makes the folder that the files of a save go to, and removes what earlier ones left half done.

        Raises:
            OSError: it cannot be made.
        """
        self._sweep()
        self.disk.make(beside := self.saving(tick))
        return beside

    def saving(self, tick: int) -> Path:
        """The folder of a save that has begun."""
        return self.folder / f"{_SAVING}{tick:010}"

    def write(self, tick: int, name: str, content: bytes) -> FileEntry:
        """Writes one file of a save.

        Raises:
            OSError: it cannot be written.
        """
        self.disk.write(self.saving(tick) / name, content)
        return FileEntry.of(content)

    def publish(self, manifest: Manifest, files: Mapping[str, FileEntry]) -> RunCheckpoint:
        """Completes a save: from here on it is there, even if the machine fails.

        Raises:
            OSError: it cannot be written.
        """
        manifest = replace(manifest, files=dict(files))
        beside, path = self.saving(manifest.tick), self._free(manifest.tick)
        content = manifest.text().encode()
        self.disk.write(beside / MANIFEST, content)
        self.disk.write(beside / SEAL, seal_of(content))
        self.disk.sync(beside)
        self.disk.rename(beside, path)
        self.disk.sync(self.folder)
        return RunCheckpoint(path, manifest)

    def _free(self, tick: int) -> Path:
        """A name that sorts behind all of this tick: an epoch may end where it was saved already."""
        names = [f"tick-{tick:010}", *(f"tick-{tick:010}-{n:02}" for n in range(1, 100))]
        return self.folder / next(name for name in names if not (self.folder / name).exists())

    def give_up(self, tick: int) -> None:
        """Removes what a save has written that failed."""
        if (beside := self.saving(tick)).exists():
            self.disk.remove(beside)

    # -- reading --------------------------------------------------------------------------------------------------

    def names(self) -> list[str]:
        """Of all checkpoints, damaged ones included, oldest first."""
        try:
            found = [path.name for path in self.folder.iterdir() if _NAMED.fullmatch(path.name)]
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise UserError(f"{self.folder} cannot be looked into: {error.strerror}") from error
        return sorted(found)

    def open(self, name: str) -> RunCheckpoint:
        """One of the names, its manifest read.

        Raises:
            CheckpointError: it is damaged.
        """
        return RunCheckpoint(self.folder / name, read_manifest(self.folder / name))

    def newest_good(self) -> RunCheckpoint | None:
        """The newest checkpoint of which every byte is right; None where there is none.

        Damaged ones are named in a warning and passed over.
        """
        for name in reversed(self.names()):
            try:
                return verified(self.folder / name)
            except CheckpointError as error:
                _log.warning("checkpoint %s is passed over: %s", name, error)
        return None

    def set_aside_behind(self, name: str) -> list[str]:
        """Takes later checkpoints than one out of the way of a run that goes on from it: they are of another future.

        Nothing is lost: they keep their files, under names that no run goes on from and none removes.

        Returns:
            What they are called now.

        Raises:
            OSError: one cannot be renamed.
        """
        aside = []
        for later in self.names():
            if later > name:
                names = chain([f"aside-{later}"], (f"aside-{later}-{n}" for n in count(2)))
                aside.append(next(new for new in names if not (self.folder / new).exists()))
                self.disk.rename(self.folder / later, self.folder / aside[-1])
        return aside

    # -- keeping --------------------------------------------------------------------------------------------------

    def prune(self, last: int, best: int = 0, metric: str = "top1", good: Iterable[str] = ()) -> list[str]:
        """Removes all but the newest and the best; the only good one never.

        Args:
            last: how many of the newest are kept, at least 1.
            best: how many of the best of those that have the metric.
            metric: `loss`, `top1` or `top5`.
            good: names of those that are known to be good, and need not be read again.

        Returns:
            The names of those removed.

        Raises:
            OSError: one cannot be removed.
        """
        names, known = self.names(), set(good)
        kept = set(names[-max(1, last) :]) | set(self._best(names, best, metric))
        if not any(name in known or self._is_good(name) for name in sorted(kept, reverse=True)):
            kept |= set(next(([name] for name in reversed(names) if self._is_good(name)), names))
        removed = [name for name in names if name not in kept]
        for name in removed:
            self._remove(self.folder / name)
        return removed

    def _best(self, names: list[str], count: int, metric: str) -> list[str]:
        if not count:
            return []
        sign = -1.0 if metric in LOWER_IS_BETTER else 1.0
        scores = [(sign * score, name) for name in names if (score := self._score(name, metric)) is not None]
        return [name for _, name in sorted(scores)[-count:]]

    def _score(self, name: str, metric: str) -> float | None:
        try:
            return (read_manifest(self.folder / name).metrics or {}).get(metric)
        except CheckpointError:
            return None

    def _is_good(self, name: str) -> bool:
        return damage_of(self.folder / name) is None

    def _remove(self, path: Path) -> None:
        """First its name, in one step, then the rest: nobody meets half a checkpoint."""
        leaving = path.with_name(f"{_REMOVING}{path.name}")
        if leaving.exists():
            self.disk.remove(leaving)
        self.disk.rename(path, leaving)
        self.disk.remove(leaving)

    def _sweep(self) -> None:
        for path in list(self._left_behind()):
            self.disk.remove(path)

    def _left_behind(self) -> Iterator[Path]:
        if self.folder.is_dir():
            yield from (path for path in self.folder.iterdir() if path.name.startswith((_SAVING, _REMOVING)))


def verified(path: Path) -> RunCheckpoint:
    """The checkpoint in a folder, every byte of it read and compared.

    Raises:
        CheckpointError: it is damaged, incomplete, or none; names the file.
    """
    manifest = read_manifest(path)
    verify_files(path, manifest)
    return RunCheckpoint(path, manifest)


def damage_of(path: Path) -> str | None:
    """What is wrong with a checkpoint; None where nothing is."""
    try:
        verified(path)
    except CheckpointError as error:
        return str(error)
    return None


def store_of(path: Path) -> Store:
    """The checkpoints of a run directory, or of its `checkpoints` folder.

    Raises:
        UserError: there is no such directory.
    """
    if not path.is_dir():
        raise UserError(f"{path} is no directory: expected a run that petra-zoo train wrote")
    return Store(path if path.name == CHECKPOINTS else path / CHECKPOINTS)


def checkpoints_in(path: Path) -> list[Path]:
    """A checkpoint itself, or those of a run directory, oldest first.

    Raises:
        UserError: there is none.
    """
    if (path / MANIFEST).exists() or _NAMED.fullmatch(path.name):
        return [path]
    store = store_of(path)
    found = [store.folder / name for name in store.names()]
    if not found:
        raise UserError(f"{path} has no checkpoints: expected a run that petra-zoo train wrote, or one checkpoint")
    return found
