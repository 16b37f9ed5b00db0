"""Ctrl-C while a command imports torch and timm, which takes seconds: a line, not a traceback."""

from __future__ import annotations

import sys
from pathlib import Path
from types import TracebackType


def is_command_line() -> bool:
    """Whether this process is `petra-zoo` or `python -m petra_zoo`: elsewhere exceptions are the user's own."""
    started_as = sys.orig_argv[1:]
    module = "-m" in started_as and "petra_zoo" in started_as[started_as.index("-m") + 1 :][:1]
    return module or Path(sys.argv[0] if sys.argv else "").stem == "petra-zoo"


def say_interruptions() -> None:
    """From now on an interruption that nobody catches is said in one line; the process ends as interrupted ones do."""
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        if was_interrupted(error):
            print("petra-zoo: interrupted", file=sys.stderr)
        else:
            before(kind, error, traceback)

    sys.excepthook = hook


def was_interrupted(error: BaseException) -> bool:
    """Whether an interruption is behind it: an extension module makes an ImportError of one, typer an exit."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, KeyboardInterrupt):
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return cause is not None
