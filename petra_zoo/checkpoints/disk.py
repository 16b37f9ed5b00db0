"""What a checkpoint does to the disk, step by step: tests stop it behind each of these steps, or fill the disk."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


class Disk:
    """The operating system's files."""

    def make(self, folder: Path) -> None:
        """Makes a folder that is not there, and those above it."""
        folder.mkdir(parents=True)

    def write(self, path: Path, content: bytes) -> None:
        """Writes a new file; when this returns, it lies on the disk and not in a cache."""
        with path.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    def sync(self, folder: Path) -> None:
        """The same for the names of a folder's files."""
        if os.name == "nt":  # where a folder cannot be opened, and renaming is on the disk by itself
            return
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def rename(self, old: Path, new: Path) -> None:
        """Gives a folder another name, in one step."""
        old.rename(new)

    def remove(self, folder: Path) -> None:
        """Removes a folder and what is in it."""
        shutil.rmtree(folder)
