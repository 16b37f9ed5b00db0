"""The model page: what is in the file. How it behaves in a browser: test_page_in_browser.py."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from petra_zoo.errors import UserError
from petra_zoo.hub.page import Accuracy, Entry, entry, page, write_page
from petra_zoo.models.activation_memory import ActivationMemory
from tests.cli.test_main import petra_zoo

MIB = 2**20


def an_entry(name: str = "petra_a", **changes: Any) -> Entry:
    facts: dict[str, Any] = {
        "summary": "A network.",
        "parameters": 11_700_000,
        "macs": 1.8e9,
        "input_size": (3, 224, 224),
        "units": 10,
        "reversible_units": 5,
        "memory": ActivationMemory(24 * MIB, 14 * MIB, 12 * MIB),
    }
    return Entry(name=name, **{**facts, **changes})


def data(html: str) -> list[dict[str, Any]]:
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', html, flags=re.DOTALL)
    return json.loads(text)


def test_the_facts_are_in_the_table_without_a_script() -> None:
    html = page([an_entry(weights=["a1_in1k"])])
    (row,) = re.findall(r'<tr id="petra_a">.*?</tr>', html, flags=re.DOTALL)
    for fact in (
        "A network.",
        ">11.70<",
        ">1.800<",
        ">224x224<",
        ">24.00<",
        ">14.00<",
        ">12.00<",
        "5 of 10",
        "a1_in1k",
    ):
        assert fact in row


def test_a_column_that_nothing_is_known_for_is_left_out() -> None:
    assert "top-1 %" not in page([an_entry()])
    assert ">weights<" not in page([an_entry()])


def test_accuracy_comes_with_its_data_set_and_source_or_not_at_all() -> None:
    known = an_entry("petra_b", accuracy=[Accuracy("digits", 99.25, "measured here")])
    html = page([an_entry(), known])
    assert "99.25<small>digits, measured here</small>" in html
    assert [row["accuracy"] for row in data(html)] == [
        [],
        [{"dataset": "digits", "top1": 99.25, "source": "measured here"}],
    ]


def test_words_of_others_cannot_become_markup() -> None:
    nasty = "</script><script>alert(1)</script>"
    html = page([an_entry(summary=nasty, weights=[nasty], accuracy=[Accuracy(nasty, 1.0, nasty)])])
    assert "<script>alert" not in html
    assert data(html)[0]["accuracy"][0]["dataset"] == nasty


def test_the_file_refers_to_nothing_outside() -> None:
    html = page([an_entry()])
    assert "default-src 'none'" in html
    assert not re.findall(r"(?:src|href)\s*=\s*[\"'](?!data:|#)", html.replace("href: `#", ""))
    assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)|@import|url\(", html)


def test_list_html_writes_the_matching_networks(tmp_path: Path) -> None:
    done = petra_zoo("list", "petra_revnet_tiny", "--html", tmp_path / "site")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"saved {tmp_path / 'site' / 'index.html'}\n"
    assert [path.name for path in (tmp_path / "site").iterdir()] == ["index.html"]
    (row,) = data((tmp_path / "site" / "index.html").read_text(encoding="utf-8"))
    facts = entry("petra_revnet_tiny")
    assert row["name"] == "petra_revnet_tiny"
    assert row["memory"] == facts.memory.as_dict()
    assert 0 < row["memory"]["reversible"] < row["memory"]["plain"]


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"cannot write .*index\.html"):
        write_page(["petra_revnet_tiny"], tmp_path / "file")
