"""Places on disk: what their names mean, and writing where somebody else's files may be."""

from __future__ import annotations

import os
import re
from pathlib import Path

from petra_zoo.errors import UserError

_HOME = re.compile(r"(^|=|local-dir:)(~[^/]*)(?=/)")


def expand_home(text: str) -> str:
    """Text that may name a place, its `~/` and `~user/` replaced by the home directory.

    A shell does that at the beginning of a word only: not in `output=~/runs`, `--data-dir=~/data`, `local-dir:~/run`.
    """
    return _HOME.sub(lambda found: found[1] + os.path.expanduser(found[2]), text)


def check_free(directory: Path, setting: str) -> None:
    """Refuses a place that holds anything: only an absent or an empty directory is written to.

    Args:
        directory: where something is about to be written.
        setting: how the user names another place, such as `--output`.

    Raises:
        UserError: there is a file, or a directory with something in it; names one of its entries.
    """
    try:
        entry = next(directory.iterdir(), None)
    except FileNotFoundError:
        return
    except NotADirectoryError as error:
        file = next(place for place in (directory, *directory.parents) if place.exists())
        what = "" if file == directory else f"cannot write {directory}: "
        raise UserError(f"{what}{file} is a file: choose another {setting}, or move it away") from error
    except OSError as error:
        raise UserError(f"{directory} cannot be looked into ({error.strerror}): choose another {setting}") from error
    if entry is not None:
        what = "a run" if (directory / "recipe.yaml").exists() else f"something else ({entry.name})"
        raise UserError(f"{directory} already holds {what}: choose another {setting}, or move it away")


def check_writable(path: Path) -> None:
    """Refuses a file that cannot be written, before the work that it is for.

    Raises:
        UserError: its folder is not there, or takes no files.
    """
    folder = path.parent
    if path.is_dir():
        raise UserError(f"cannot write {path}: it is a folder; name a file in it")
    if not folder.is_dir():
        raise UserError(f"cannot write {path}: there is no folder {folder}; make it first")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise UserError(f"cannot write {path}: permission denied")


def write_whole(path: Path, text: str) -> None:
    """Writes beside, then renames: the file is complete, as it was or as it is to be, at any time.

    Raises:
        OSError: it cannot be written; nothing has changed.
    """
    beside = path.with_name(f".{path.name}.new")
    try:
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise


def apply_umask(file: Path) -> None:
    """Gives a file the permissions of one that is simply opened: safetensors keeps to itself what it writes.

    The umask itself can only be read by changing it, for all threads; a file beside it tells.
    """
    beside = file.with_name(f".{file.name}.mode")
    with beside.open("xb") as opened:
        mode = os.fstat(opened.fileno()).st_mode & 0o777
    beside.unlink()
    file.chmod(mode)
