"""One process at a time trains into a directory: the next one may take it for a run that has ended."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from petra_zoo.errors import UserError

LOCK = ".lock"


@contextmanager
def held_by_this_run(directory: Path) -> Iterator[None]:
    """Inside, nobody else may train into the directory; the operating system lets go where a process dies.

    Raises:
        UserError: somebody does already.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    path = directory / LOCK
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
    except OSError as error:
        raise UserError(f"cannot write the run to {directory}: {error.strerror}; choose another output=DIR") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{directory} already holds a run, in progress: choose another output=DIR") from error
        except OSError:  # a file system without locks
            pass
        yield
        path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def is_held(directory: Path) -> bool:
    """Whether a process trains into the directory now; it is not disturbed."""
    try:
        import fcntl

        descriptor = os.open(directory / LOCK, os.O_RDONLY)
    except (ImportError, OSError):  # Windows; or nobody has locked it
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return False
    finally:
        os.close(descriptor)
    return False
