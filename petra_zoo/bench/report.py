"""Reports: all tables and plots of results in one folder, and pages kept up to date."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from petra_zoo.bench.charts import Source
from petra_zoo.bench.drawing import draw_chart
from petra_zoo.bench.pages import Page
from petra_zoo.bench.plots import charts
from petra_zoo.bench.results import Results
from petra_zoo.bench.tables import tables
from petra_zoo.errors import UserError
from petra_zoo.files import write_whole


def markdown_report(path: Path, pictures: Sequence[tuple[str, str]] = ()) -> str:
    """All tables of a results file under their names.

    Args:
        path: of the results.
        pictures: names of charts and their files, to show below.

    Raises:
        UserError: it is no results file.
    """
    results = Results.read(path)
    parts = [f"## {results.study}", *(f"### {name}\n\n{table}" for name, table in tables(results).items())]
    return "\n\n".join([*parts, *(f"### {name}\n\n![{name}]({file})" for name, file in pictures)]) + "\n"


def report_into(path: Path, directory: Path) -> Iterator[str]:
    """Writes `STUDY.md` with all tables, and a plot as `STUDY-NAME.svg` each.

    Yields:
        A line on every file; the plots are left out, with a line that says why, where matplotlib is missing.

    Raises:
        UserError: it is no results file, or the directory cannot be written.
    """
    results = Results.read(path)
    called = re.sub(r"[^\w.-]+", "-", results.study)  # no other folder, and no space, which ends a link
    drawn: dict[str, tuple[str, str]] = {}
    for name, chart in charts(results).items():
        try:
            drawn[name] = f"{called}-{name}.svg", draw_chart(chart, Source(path.name, name, chart.digest))
        except UserError as error:
            yield f"left out {name}: {error}"
    page = markdown_report(path, [(name, file) for name, (file, _) in drawn.items()])
    for file, text in [*drawn.values(), (f"{called}.md", page)]:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            write_whole(directory / file, text)
        except OSError as error:
            raise UserError(f"cannot write {directory / file}: {error.strerror}") from error
        yield str(directory / file)


def differences(pages: Sequence[Path]) -> list[str]:
    """A line on every table and picture of some pages that shows something else than its results.

    Raises:
        UserError: a page cannot be read, or marks what there is not.
    """
    return [
        f"{path}, line {shown.line}: {shown.mark} shows something else than the results"
        for path in pages
        for shown in Page(path).shown
        if shown.stale
    ]


def standing(pages: Sequence[Path]) -> list[str]:
    """A line on every page of which all is as its results say, and on every page that shows none.

    Raises:
        UserError: as `differences`.
    """
    lines = []
    for path in pages:
        shown = Page(path).shown
        if not shown:
            lines.append(f"{path}: no table and no plot is marked")
        elif not any(part.stale for part in shown):
            lines.append(f"{path}: {len(shown)} marked, all as the results say")
    return lines


def update(pages: Sequence[Path]) -> Iterator[str]:
    """Brings pages and their pictures up to date.

    Yields:
        A line on everything that was stale.

    Raises:
        UserError: as `differences`; or a file cannot be written, or matplotlib is missing.
    """
    for path in pages:
        page = Page(path)
        stale = [shown for shown in page.shown if shown.stale]  # a picture knows by its file, which is about to change
        page.update()
        yield from (f"{path}, line {shown.line}: {shown.mark} is up to date now" for shown in stale)
