"""A disk that fails where somebody wants it to."""

import errno
from pathlib import Path

from petra_zoo.checkpoints.disk import Disk


class Killed(BaseException):
    """The process is gone: nothing that it would still have done happens."""


class FaultyDisk(Disk):
    """Does so many steps and then fails, half of a file written.

    Args:
        steps: that succeed.
        full: the disk is full, and files can still be removed; else the process is killed.
    """

    def __init__(self, steps: int, full: bool = False) -> None:
        self.left, self.full, self.dead = steps, full, False

    def _step(self) -> bool:
        if self.dead:
            raise Killed
        self.left -= 1
        return self.left < 0

    def _fail(self) -> None:
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.dead = True
        raise Killed

    def make(self, folder: Path) -> None:
        if self._step():
            self._fail()
        super().make(folder)

    def write(self, path: Path, content: bytes) -> None:
        if self._step():
            path.write_bytes(content[: len(content) // 2])
            self._fail()
        super().write(path, content)

    def sync(self, folder: Path) -> None:
        if self._step() and not self.full:
            self._fail()
        super().sync(folder)

    def rename(self, old: Path, new: Path) -> None:
        if self._step() and not self.full:
            self._fail()
        super().rename(old, new)

    def remove(self, folder: Path) -> None:
        if not self.full and self._step():
            next(path for path in folder.iterdir()).unlink()
            self._fail()
        super().remove(folder)
