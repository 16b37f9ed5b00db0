"""The model page: one static HTML file with a table to sort and search, and memory against accuracy."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

import timm

from petra_zoo.errors import UserError
from petra_zoo.models.activation_memory import ActivationMemory, activation_memory
from petra_zoo.models.describe import describe

MIB = 2**20
COLUMNS = (
    ("M parameters", "number"),
    ("GMACs", "number"),
    ("input", "number"),
    ("MiB stored", "number"),
    ("MiB checkpointed", "number"),
    ("MiB reversible", "number"),
    ("reversible units", "number"),
    ("weights", "text"),
    ("top-1 %", "number"),
)
Cell = tuple[Any, str]  # what a column is sorted by, and what is shown


@dataclass(frozen=True)
class Accuracy:
    """A figure and where it comes from.

    Attributes:
        top1: in percent.
        source: who says so: measured here, or the source's own figure.
    """

    dataset: str
    top1: float
    source: str


@dataclass(frozen=True)
class Entry:
    """What the page says of a network; accuracy only where there is a figure with a source."""

    name: str
    summary: str
    parameters: int
    macs: float
    input_size: tuple[int, int, int]
    units: int
    reversible_units: int
    memory: ActivationMemory
    weights: Sequence[str] = ()
    accuracy: Sequence[Accuracy] = ()

    @property
    def input(self) -> str:
        """Height and width of an image."""
        return f"{self.input_size[1]}x{self.input_size[2]}"


def entry(name: str) -> Entry:
    """Looks a network up; takes a second or two, its memory is computed.

    Raises:
        UserError: no such network.
    """
    facts = describe(name)
    return Entry(
        name=name,
        summary=facts.summary,
        parameters=facts.parameters,
        macs=facts.macs,
        input_size=facts.input_size,
        units=facts.units,
        reversible_units=facts.reversible_units,
        memory=activation_memory(timm.create_model(name, device="meta"), facts.input_size),
        weights=[tag.partition(".")[2] for tag in timm.list_pretrained(f"{name}.*")],
    )


def write_page(names: Iterable[str], folder: Path) -> Path:
    """Writes `folder`/index.html about the networks; it needs no other file and no network.

    Raises:
        UserError: no such network, or the file cannot be written; what was there before stays.
    """
    text = page([entry(name) for name in names])
    path = folder / "index.html"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".page-") as scratch:
            new = Path(scratch) / path.name
            new.write_text(text, encoding="utf-8")
            os.replace(new, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    return path


def page(entries: Sequence[Entry]) -> str:
    """The page's HTML."""
    rows = [_cells(one) for one in entries]
    used = [i for i in range(len(COLUMNS)) if any(row[i][0] != "" for row in rows)]
    head = [f'<th scope="col" data-kind="{kind}"{_text(kind)}>{_button(label)}</th>' for label, kind in _columns(used)]
    body = [_row(one, [row[i] for i in used], _columns(used)) for one, row in zip(entries, rows, strict=True)]
    data = json.dumps([_facts(one) for one in entries]).replace("<", "\\u003c")  # no tag ends inside the script
    template = resources.files("petra_zoo.hub").joinpath("page.html").read_text(encoding="utf-8")
    filled = {"HEAD": "\n".join([f'<th scope="col" data-kind="text">{_button("network")}</th>', *head])}
    for mark, text in {**filled, "ROWS": "\n".join(body), "DATA": data}.items():
        template = template.replace(f"<!-- {mark} -->", text)
    return template


def _facts(one: Entry) -> dict[str, Any]:
    facts = {key: getattr(one, key) for key in ("name", "parameters", "input")}
    return facts | {"memory": one.memory.as_dict(), "accuracy": [asdict(figure) for figure in one.accuracy]}


def _cells(one: Entry) -> list[Cell]:
    memory = (one.memory.plain, one.memory.checkpointed, one.memory.reversible)
    figures = "".join(
        f"{figure.top1:.2f}<small>{escape(figure.dataset)}, {escape(figure.source)}</small>" for figure in one.accuracy
    )
    return [
        (one.parameters, f"{one.parameters / 1e6:.2f}"),
        (one.macs, f"{one.macs / 1e9:.3f}"),
        (one.input_size[1] * one.input_size[2], one.input),
        *((value, f"{value / MIB:.2f}") for value in memory),
        (one.reversible_units, f"{one.reversible_units} of {one.units}"),
        (" ".join(one.weights), "<br>".join(map(escape, one.weights))),
        (max((figure.top1 for figure in one.accuracy), default=""), figures),
    ]


def _row(one: Entry, cells: Sequence[Cell], columns: Sequence[tuple[str, str]]) -> str:
    written = "".join(
        f'<td data-label="{label}" data-value="{escape(str(value))}"{_text(kind)}><span>{text}</span></td>'
        for (value, text), (label, kind) in zip(cells, columns, strict=True)
    )
    name, summary = escape(one.name), escape(one.summary)
    return f'<tr id="{name}"><th scope="row" data-value="{name}">{name}<small>{summary}</small></th>{written}</tr>'


def _columns(used: Sequence[int]) -> list[tuple[str, str]]:
    return [COLUMNS[i] for i in used]


def _button(label: str) -> str:
    return f'<button type="button">{label}</button>'


def _text(kind: str) -> str:
    return ' class="text"' if kind == "text" else ""
