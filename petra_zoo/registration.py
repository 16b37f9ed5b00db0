"""The models register with timm when timm is imported, so that importing petra_zoo alone costs nothing."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from importlib.abc import Loader
else:  # Python asks for no base class, and importlib.abc brings importlib.resources along
    Loader = object


def register_with_timm() -> None:
    """Registers the models at once where timm is imported already, else as soon as it has been."""
    if sys.modules.get("timm"):
        importlib.import_module("timm")  # waits where another thread is about to import it
        _register()
    elif not any(isinstance(finder, _Timm) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Timm())


def _register() -> None:
    # Where this very import is what imports timm, it is under way, and there is nothing left to do.
    importlib.import_module("petra_zoo.models")


class _Timm:
    """Finds timm where Python would, and has the models registered behind it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "timm":
            return None
        # Those behind this one only: a second one, of a copy of this module, would ask this one in turn.
        for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:
            if spec := finder.find_spec(fullname, path, target):
                if spec.loader:
                    spec.loader = _ThenRegister(spec.loader)
                return spec
        return None  # Python says that there is no timm


class _ThenRegister(Loader):
    """Loads timm as its own loader does, then registers the models: an error of theirs is one of the import."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__:  # from here on only timm's own loader is seen, which knows its files
            module.__spec__.loader = self.loader
        module.__loader__ = self.loader
        self.loader.exec_module(module)
        _register()
