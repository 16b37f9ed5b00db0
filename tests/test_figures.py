"""Every number in a table of the README and the docs, and every picture, comes from a committed result."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from petra_zoo.bench.pages import Page
from tests import your_images

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NOT_MEASURED = "<!-- not measured -->"  # of a table: its numbers are settings, shapes, formulas or versions
MADE_BY_COMMANDS = {path.resolve() for path in your_images.PICTURES.values()}  # of a page whose commands a test runs
IMAGE = re.compile(r"!\[[^\]]*\]\((?P<markdown>[^)\s]+)|<img[^>]*\bsrc=\"(?P<html>[^\"]+)")


def tables_with_numbers(page: Page) -> Iterator[tuple[int, int, str]]:
    """Where each begins and ends in the text, and the line above it; code blocks hold none."""
    text = re.sub(r"^```.*?^```", lambda code: re.sub(r"[|!]", " ", code[0]), page.text, flags=re.DOTALL | re.MULTILINE)
    for found in re.finditer(r"(?:^\|.*(?:\n|\Z))+", text, flags=re.MULTILINE):
        if re.search(r"\d", found[0]):
            above = text[: found.start()].rstrip("\n").rpartition("\n")[2]
            yield found.start(), found.end(), above


def what_is_wrong(page: Page) -> list[str]:
    """A line on each figure of a page that is not tied to its results, or shows something else."""
    wrong = [f"line {shown.line}: {shown.mark} is stale" for shown in page.shown if shown.stale]
    for start, end, above in tables_with_numbers(page):
        tied = any(table.start <= start and end <= table.end for table in page.tables)
        if not tied and above != NOT_MEASURED:
            line = page.text.count("\n", 0, start) + 1
            wrong.append(f"line {line}: a table with numbers, neither marked as of results nor as {NOT_MEASURED}")
    pictures = {picture.path.resolve() for picture in page.pictures} | MADE_BY_COMMANDS
    for image in IMAGE.finditer(page.text):
        if (page.path.parent / (image["markdown"] or image["html"])).resolve() not in pictures:
            wrong.append(f"{image[0]} is not marked as a plot of results")
    return wrong


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_figure_comes_from_a_committed_result(path: Path) -> None:
    assert not what_is_wrong(Page(path)), "petra-zoo report --update README.md docs/*.md brings them up to date"


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").rglob("*.md")), ids=lambda path: path.parent.name)
def test_the_pages_of_benchmarks_show_their_results(path: Path) -> None:
    assert not [shown.mark for shown in Page(path).shown if shown.stale]


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A folder with results and a page that shows them."""
    shutil.copytree(ROOT / "benchmarks" / "methods", tmp_path / "benchmarks" / "methods")
    page = tmp_path / "page.md"
    page.write_text("# Page\n\n<!-- table: benchmarks/methods/results.json summary -->\n<!-- /table -->\n")
    Page(page).update()
    assert not what_is_wrong(Page(page))
    return tmp_path


@pytest.mark.parametrize("digit", ["98.98", "61.70)", "k = 4"])
def test_a_figure_that_is_changed_by_hand_is_found(repository: Path, digit: str) -> None:
    page = repository / "page.md"
    assert digit in page.read_text()
    page.write_text(page.read_text().replace(digit, digit.replace("8", "7").replace("1", "2").replace("4", "5"), 1))
    assert "is stale" in what_is_wrong(Page(page))[0]


def test_a_result_that_is_changed_is_found(repository: Path) -> None:
    results = repository / "benchmarks" / "methods" / "results.json"
    results.write_text(results.read_text().replace('"top1": 99.16666666666667', '"top1": 99.2', 1))
    assert "is stale" in what_is_wrong(Page(repository / "page.md"))[0]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("| a | b |\n|---|---|\n| 1 | 2 |\n", True),
        ("text\n| a | b |\n|---|---|\n| 1 | 2 |", True),
        ("| a | b |\n|---|---|\n| one | two |\n", False),
        (f"{NOT_MEASURED}\n| a | b |\n|---|---|\n| 1 | 2 |\n", False),
        (f"{NOT_MEASURED}\n| a |\n|---|\n| 1 |\n\n| a |\n|---|\n| 1 |\n", True),
        ("```\n| a |\n|---|\n| 1 |\n```\n", False),
        ("![a curve](curve.svg)\n", True),
        ('<img src="curve.png">\n', True),
    ],
)
def test_what_is_not_tied_to_results_is_found(tmp_path: Path, text: str, found: bool) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    assert bool(what_is_wrong(Page(page))) == found
