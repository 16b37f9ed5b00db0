"""Objects that are known by name: what a recipe may name, and what a package beside this one may add."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

from petra_zoo.errors import UserError
from petra_zoo.extensions import load_entry_points

T = TypeVar("T")


class Registry(Mapping[str, T]):
    """Names and what they stand for, in the order of registration.

    Args:
        kind: what is registered, for messages, such as "data set".
        entry_points: the group of entry points through which installed packages add theirs, loaded at the first look.

    Example:
        >>> LOSSES = Registry[Loss]("loss", "petra_zoo.losses")
        >>> LOSSES.add("cross_entropy", F.cross_entropy)
        >>> LOSSES.find("cross_entropy")
    """

    def __init__(self, kind: str, entry_points: str) -> None:
        self.kind, self.entry_points = kind, entry_points
        self._known: dict[str, T] = {}

    def add(self, name: str, item: T) -> None:
        """Registers an object; the same one twice is once.

        Raises:
            UserError: the name is taken, or none.
        """
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
            raise UserError(f"{name!r} cannot name a {self.kind}: expected letters, digits, '_', '.' and '-'")
        if self._known.setdefault(name, item) != item:
            raise UserError(f"there is a {self.kind} {name!r} already: register yours under another name")

    def find(self, name: str) -> T:
        """What the name stands for.

        Raises:
            UserError: it is unknown; gives the nearest.
        """
        if name not in self:
            raise UserError(f"unknown {self.kind} {name!r}; {self.hint(name)}")
        return self[name]

    def hint(self, name: str) -> str:
        """What else it may have been, for messages: the one or two names that are most like it, else all there are."""
        near = difflib.get_close_matches(name, self, n=2)
        return f"did you mean {' or '.join(near)}?" if near else f"expected {' or '.join(self)}"

    def __getitem__(self, name: str) -> T:
        load_entry_points(self.entry_points)
        return self._known[name]

    def __iter__(self) -> Iterator[str]:
        load_entry_points(self.entry_points)
        return iter(self._known)

    def __len__(self) -> int:
        load_entry_points(self.entry_points)
        return len(self._known)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """What is registered in here is forgotten afterwards: for tests."""
        before = dict(self._known)
        try:
            yield
        finally:
            self._known = before
