"""Markdown pages that show results: every table is rendered from a results file, every picture drawn from one.

A page marks where a table stands, and of what it is:

    <!-- table: benchmarks/evidence/delay.json accuracy -->
    | contender | ...
    <!-- /table -->

The file's name is seen from the top of the repository: from the nearest folder above the page that has such a file.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from petra_zoo.bench.results import Results
from petra_zoo.bench.tables import find_table
from petra_zoo.errors import UserError
from petra_zoo.files import write_whole

BEGIN = re.compile(r"<!-- table: (?P<file>\S+) (?P<name>.+?) -->")
END = "<!-- /table -->"


@dataclass(frozen=True)
class Block:
    """A marked table of a page.

    Attributes:
        file, name: of the results and of the table, as the page has them.
        line: of the mark, from 1.
        text: what stands between the marks.
        rendered: what is to stand there.
    """

    file: str
    name: str
    line: int
    text: str
    rendered: str

    @property
    def stale(self) -> bool:
        """Whether the page says something else than the results."""
        return self.text != self.rendered


class Page:
    """A Markdown page and its marked tables.

    Raises:
        UserError: it cannot be read, or a mark names what there is not; with page and line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"page {path} cannot be read: {error}") from error
        self.blocks: list[Block] = []
        self.updated = self._updated()

    def write(self) -> None:
        """Brings the page up to date.

        Raises:
            UserError: it cannot be written.
        """
        try:
            write_whole(self.path, self.updated)
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}") from error

    def _updated(self) -> str:
        """The page with all its tables as they are to be; fills `blocks`."""
        kept, place = [], 0
        for mark in BEGIN.finditer(self.text):
            if mark.start() < place:
                continue  # inside a block: its end is missing
            line = self.text.count("\n", 0, mark.start()) + 1
            end = self.text.find(END, mark.end())
            if end < 0:
                raise UserError(f"{self.path}, line {line}: {mark[0]} has no {END} behind it")
            block = self._block(mark["file"], mark["name"], line, self.text[mark.end() : end])
            self.blocks.append(block)
            kept += [self.text[place : mark.end()], block.rendered]
            place = end
        return "".join([*kept, self.text[place:]])

    def _block(self, file: str, name: str, line: int, text: str) -> Block:
        try:
            rendered = find_table(Results.read(self.place_of(file)), name)
        except UserError as error:
            raise UserError(f"{self.path}, line {line}: {error}") from error
        return Block(file, name, line, text, f"\n{rendered}\n")

    def place_of(self, file: str) -> Path:
        """Where a file is that the page names.

        Raises:
            UserError: nowhere.
        """
        for folder in self.path.resolve().parents:
            if (folder / file).is_file():
                return folder / file
        raise UserError(f"there is no file {file} in any folder above the page")
