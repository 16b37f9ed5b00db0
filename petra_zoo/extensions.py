"""What others add: models, data sets, methods and losses of installed packages, and modules that a user names.

An installed package announces a module in an entry point; importing the module registers what it has:

    [project.entry-points."petra_zoo.models"]
    mynet = "mynet.models"

The groups are `petra_zoo.models`, `petra_zoo.datasets`, `petra_zoo.methods` and `petra_zoo.losses`.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from petra_zoo.errors import UserError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

_log = logging.getLogger(__name__)
_loaded: set[str] = set()  # groups of entry points
_imported: list[str] = []  # modules that the user named


def load_entry_points(group: str) -> None:
    """Imports what installed packages announce in a group, once per process.

    What does not import is left out with one line that names the package: it is none of the user's mistakes.
    """
    if group in _loaded:
        return
    from importlib.metadata import entry_points

    _loaded.add(group)  # first: what is imported may itself look into the registry that this fills
    for entry in entry_points(group=group):
        try:
            entry.load()
        except (Exception, SystemExit) as error:  # a script taken for a module may leave, and the zoo with it
            _log.warning("%s", _broken(entry, error))


def _broken(entry: EntryPoint, error: BaseException) -> str:
    package = f"{entry.dist.name} {entry.dist.version}" if entry.dist else "an installed package"
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    return f"{package} is left out: its entry point {entry.name} = {entry.value} of {entry.group} raises {reason}"


def import_modules(names: Sequence[str]) -> None:
    """Imports modules that the user named, from the current directory too, as `python -m` does.

    Raises:
        UserError: there is no such module, or it needs one that is not installed.
    """
    if names and not {"", os.getcwd()} & set(sys.path):
        sys.path.insert(0, os.getcwd())
    for name in names:
        if not all(part.isidentifier() for part in name.split(".")):
            raise UserError(f"--import {name}: expected a module as Python's import takes it, such as mynet.models")
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise UserError(f"--import {name}: {_missing(name, error.name or name)}") from error
        if name not in _imported:
            _imported.append(name)


def _missing(name: str, missing: str) -> str:
    if missing != name and not name.startswith(f"{missing}."):
        return f"it imports {missing}, which is not installed"
    if name.endswith(".py"):
        return f"expected a module, not a file: --import {name.removesuffix('.py')}"
    return f"there is no module {missing}, neither installed nor in {os.getcwd()}"


def import_options() -> list[str]:
    """The options with which another process's command line imports what this one has."""
    return [word for name in _imported for word in ("--import", name)]


def imported_modules() -> list[str]:
    """The modules that the user named."""
    return list(_imported)
