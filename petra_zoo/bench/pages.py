"""Markdown pages that show results: every table is rendered from a results file, every picture drawn from one.

A page marks where a table stands, and of what it is:

    <!-- table: benchmarks/evidence/delay.json accuracy -->
    | contender | ...
    <!-- /table -->

and where a picture does, of what chart, in the line above it:

    <!-- plot: benchmarks/evidence/delay.json delay -->
    ![Top-1 against the delay](evidence/delay.svg)

The results file's name is seen from the top of the repository: from the nearest folder above the page that has it.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

from petra_zoo.bench.charts import Chart, Source
from petra_zoo.bench.drawing import draw_chart
from petra_zoo.bench.plots import find_chart
from petra_zoo.bench.results import Results
from petra_zoo.bench.tables import find_table
from petra_zoo.errors import UserError
from petra_zoo.files import write_whole

_TABLE = re.compile(r"<!-- table: (?P<file>\S+) (?P<name>.+?) -->\n(?P<text>.*?)(?P<end><!-- /table -->|\Z)", re.DOTALL)
_PLOT = re.compile(r"<!-- plot: (?P<file>\S+) (?P<name>.+?) -->\n!\[(?P<alt>[^\]]*)\]\((?P<picture>[^)\s]+)\)")
_MARK = re.compile(r"<!-- *(table|plot) *:.*")


class Shown(ABC):
    """Something of a page that shows results: a table or a picture.

    Attributes:
        mark, line: what says so, and where.
    """

    mark: str
    line: int

    @property
    @abstractmethod
    def stale(self) -> bool:
        """Whether it shows something else than what the results say."""


@dataclass(frozen=True)
class Table(Shown):
    """Text of a page, from `start` to `end`, and what the results say."""

    mark: str
    line: int
    start: int
    end: int
    text: str
    rendered: str

    @property
    def stale(self) -> bool:
        return self.text != self.rendered


@dataclass(frozen=True)
class Picture(Shown):
    """A picture's file, and the chart that it is to show."""

    mark: str
    line: int
    path: Path
    chart: Chart
    source: Source

    @property
    def stale(self) -> bool:
        return Source.of(self.path) != self.source


class Page:
    """A Markdown page and what it shows of results.

    Attributes:
        path, text: of the page.
        tables, pictures: those that are marked.

    Raises:
        UserError: the page cannot be read, or a mark is not as above, or names what there is not; with page and line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(f"page {path} cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise UserError(f"page {path} is no text: {error}") from error
        self.tables = [self._table(found) for found in _TABLE.finditer(self.text)]
        self.pictures = [self._picture(found) for found in _PLOT.finditer(self.text)]
        known = {shown.line for shown in self.shown}
        for mark in _MARK.finditer(self.text):
            if self._line(mark) not in known:
                raise self._wrong(
                    mark,
                    "expected <!-- table: FILE NAME --> around a table, or <!-- plot: FILE NAME --> above a picture",
                )

    @property
    def shown(self) -> list[Shown]:
        """All that the page shows of results."""
        return [*self.tables, *self.pictures]

    def update(self) -> None:
        """Puts the results' tables into the page, and draws the pictures that are stale.

        Raises:
            UserError: a file cannot be written, or matplotlib is missing.
        """
        text = self.text
        for table in reversed(self.tables):  # so that the places of those before stay right
            text = text[: table.start] + table.rendered + text[table.end :]
        files = {picture.path: draw_chart(picture.chart, picture.source) for picture in self.pictures if picture.stale}
        if text != self.text:
            files[self.path] = text
        for path, content in files.items():
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_whole(path, content)
            except OSError as error:
                raise UserError(f"cannot write {path}: {error.strerror}") from error

    def _table(self, found: re.Match[str]) -> Table:
        if not found["end"] or _MARK.search(found["text"]):  # else what follows would be lost
            raise self._wrong(found, "there is no <!-- /table --> behind it")
        try:
            rendered = find_table(self._results(found["file"]), found["name"])
        except UserError as error:
            raise self._wrong(found, str(error)) from error
        return Table(_first_line(found), self._line(found), *found.span("text"), found["text"], f"{rendered}\n")

    def _picture(self, found: re.Match[str]) -> Picture:
        try:
            chart = find_chart(self._results(found["file"]), found["name"])
        except UserError as error:
            raise self._wrong(found, str(error)) from error
        source = Source(found["file"], found["name"], chart.digest)
        return Picture(_first_line(found), self._line(found), self.path.parent / found["picture"], chart, source)

    def _results(self, file: str) -> Results:
        for folder in self.path.resolve().parents:
            if (folder / file).is_file():
                return Results.read(folder / file)
        raise UserError(f"there is no file {file} in any folder above the page")

    def _line(self, found: re.Match[str]) -> int:
        return self.text.count("\n", 0, found.start()) + 1

    def _wrong(self, found: re.Match[str], why: str) -> UserError:
        return UserError(f"{self.path}, line {self._line(found)}: {_first_line(found)}: {why}")


def _first_line(found: re.Match[str]) -> str:
    return found[0].partition("\n")[0]
