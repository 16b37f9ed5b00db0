"""Charts as data: what is to be drawn of results, known without drawing it. Imports no matplotlib."""

from __future__ import annotations

import hashlib
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from petra_zoo.strict_json import to_json

_SOURCE = re.compile(r"petra-zoo report: (?P<file>\S+) (?P<name>[^<]+?) sha256:(?P<digest>[0-9a-f]{64})")


@dataclass(frozen=True)
class Point:
    """A value and its interval; `low` and `high` are equal to `y` where there is none."""

    x: float
    y: float
    low: float
    high: float


@dataclass(frozen=True)
class Series:
    """Points of one kind.

    Attributes:
        label: in the legend.
        color, marker: numbers from 0 on; equal ones look alike, in all panels.
    """

    label: str
    color: int
    marker: int
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Level:
    """A value of y that a reader compares with."""

    y: float
    label: str


@dataclass(frozen=True)
class Panel:
    """Axes and what is in them.

    Attributes:
        x, y: what the axes say, units included.
        levels: horizontal lines.
        apart: whether series stand side by side, so that intervals at the same x do not hide each other.
        scale: of y: `linear`, `log`, or `symlog`, which is linear between -1 and 1.
    """

    title: str
    x: str
    y: str
    series: tuple[Series, ...]
    levels: tuple[Level, ...] = ()
    apart: bool = False
    scale: str = "linear"


@dataclass(frozen=True)
class Chart:
    """Panels side by side, in rows of `columns`, with one legend."""

    panels: tuple[Panel, ...]
    columns: int = 2

    @property
    def digest(self) -> str:
        """Of all that is drawn; another one means that a picture is older than its results."""
        return hashlib.sha256(to_json(asdict(self)).encode()).hexdigest()


@dataclass(frozen=True)
class Source:
    """What a picture was drawn from; it stands in the picture's metadata.

    Attributes:
        file, name: of the results and of the chart.
        digest: of the chart.
    """

    file: str
    name: str
    digest: str

    def __str__(self) -> str:
        return f"petra-zoo report: {self.file} {self.name} sha256:{self.digest}"

    @classmethod
    def of(cls, picture: Path) -> Source | None:
        """What an SVG file says of itself; None where it says nothing, or is not there."""
        try:
            found = _SOURCE.search(picture.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError):
            return None
        return found and cls(found["file"], found["name"], found["digest"])
