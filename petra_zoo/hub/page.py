"""The model page: one static HTML file with a table to sort and search, and memory against accuracy."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from pathlib import Path

from petra_zoo.errors import UserError
from petra_zoo.hub.catalog import Facts, Reference, look_up
from petra_zoo.strict_json import JsonObject, to_json

_MIB = 2**20
_COLUMNS = (
    "M parameters",
    "GMACs",
    "input",
    "MiB stored",
    "MiB checkpointed",
    "MiB reversible",
    "reversible units",
    "weights",
    "top-1 %",
)
TITLE = b"<title>petra-zoo: the networks</title>"  # as in page.html
_ELSEWHERE = "published with the source"
Cell = tuple[float | str, str]  # what a column is sorted by, and what is shown


@dataclass(frozen=True)
class Entry:
    """A network, and those of its pretrained weights whose accuracy is known, each with its own memory."""

    network: Facts
    measured: Sequence[Facts] = ()

    def accuracies(self) -> Iterator[tuple[Facts, Reference]]:
        """The pretrained weights and their accuracy."""
        for facts in self.measured:
            for tag in facts.tags:
                if tag.reference is not None:
                    yield facts, tag.reference


def entry(name: str) -> Entry:
    """Looks a network up; takes a second or two for each accuracy, whose memory is computed.

    Raises:
        UserError: no such network.
    """
    facts = look_up(name)
    return Entry(facts, [look_up(tag.name) for tag in facts.tags if tag.reference is not None])


def write_page(names: Iterable[str], folder: Path) -> Path:
    """Writes `folder`/index.html about the networks; it needs no other file and no network.

    Raises:
        UserError: no such network, the file cannot be written, or is there and no page of this kind; what was there
            before stays.
    """
    path = folder / "index.html"
    if path.exists() and (not path.is_file() or TITLE not in path.read_bytes()):
        raise UserError(f"{path} exists already and is no page of petra-zoo: choose another directory, or move it away")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".page-") as scratch:  # a minute of work is not for nothing
            new = Path(scratch) / path.name
            new.write_text(render_page([entry(name) for name in names]), encoding="utf-8")
            os.replace(new, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    return path


def render_page(entries: Sequence[Entry]) -> str:
    """The page's HTML."""
    rows = [_cells(one) for one in entries]
    used = [i for i in range(len(_COLUMNS)) if any(row[i][0] != "" for row in rows)]
    labels = [_COLUMNS[i] for i in used]
    head = [f'<th scope="col"><button type="button">{label}</button></th>' for label in ("network", *labels)]
    body = [_row(one, [row[i] for i in used], labels) for one, row in zip(entries, rows, strict=True)]
    data = to_json([_facts(one) for one in entries]).replace("<", "\\u003c")  # no tag ends inside the script
    template = resources.files("petra_zoo.hub").joinpath("page.html").read_text(encoding="utf-8")
    for mark, text in {"HEAD": "\n".join(head), "ROWS": "\n".join(body), "DATA": data}.items():
        template = template.replace(f"<!-- {mark} -->", text)
    return template


def _facts(one: Entry) -> JsonObject:
    def common(facts: Facts) -> JsonObject:
        return {
            "name": facts.network.name,
            "parameters": facts.network.parameters,
            "input": _input(facts),
            "memory": facts.memory.as_dict(),
        }

    accuracy = [
        {**common(facts), "dataset": found.dataset, "top1": found.top1, "source": found.source}
        for facts, found in one.accuracies()
    ]
    return {**common(one.network), "accuracy": accuracy}


def _cells(one: Entry) -> list[Cell]:
    network, memory = one.network.network, one.network.memory
    tags = [_tag_of(tag.name) for tag in one.network.tags]
    figures = "".join(
        f'<div title="{escape(found.source)}">{found.top1:.2f}<small>{escape(_tag_of(facts.network.name))}, '
        f"{escape(found.dataset)}, {'measured here' if found.measured_here else _ELSEWHERE}</small></div>"
        for facts, found in one.accuracies()
    )
    return [
        (network.parameters, f"{network.parameters / 1e6:.2f}"),
        (network.macs, f"{network.macs / 1e9:.3f}"),
        (network.input_size[1] * network.input_size[2], _input(one.network)),
        *((value, f"{value / _MIB:.2f}") for value in (memory.plain, memory.checkpointed, memory.reversible)),
        (network.reversible_units, f"{network.reversible_units} of {network.units}"),
        (len(tags) or "", _folded(tags)),
        (max((found.top1 for _, found in one.accuracies()), default=""), figures),
    ]


def _folded(tags: Sequence[str]) -> str:
    lines = "<br>".join(map(escape, tags))
    return lines if len(tags) < 2 else f"<details><summary>{len(tags)} tags</summary>{lines}</details>"


def _input(facts: Facts) -> str:
    return "x".join(map(str, facts.network.input_size[1:]))


def _tag_of(name: str) -> str:
    return name.partition(".")[2]


def _row(one: Entry, cells: Sequence[Cell], labels: Sequence[str]) -> str:
    written = "".join(
        f'<td data-label="{label}" data-value="{escape(str(value))}"><span>{text}</span></td>'
        for (value, text), label in zip(cells, labels, strict=True)
    )
    name, summary = escape(one.network.network.name), escape(one.network.network.summary)
    return f'<tr id="{name}"><th scope="row" data-value="{name}">{name}<small>{summary}</small></th>{written}</tr>'
