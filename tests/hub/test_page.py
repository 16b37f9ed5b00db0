"""The model page: what is in the file. How it behaves in a browser: test_page_in_browser.py."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from petra_zoo.errors import UserError
from petra_zoo.hub.catalog import Facts, Reference, Tag
from petra_zoo.hub.page import Entry, entry, render_page, write_page
from petra_zoo.models.describe import Description
from petra_zoo.models.training_memory import ActivationMemory
from tests.cli.test_main import petra_zoo

MIB = 2**20


def facts(name: str, tags: Sequence[Tag] = (), **changes: Any) -> Facts:
    network = {
        "summary": "A network.",
        "parameters": 11_700_000,
        "macs": 1.8e9,
        "input_size": (3, 224, 224),
        "num_classes": 1000,
        "units": 10,
        "reversible_units": 5,
        "runs": [5],
        "coupling": [1.0],
    }
    memory = changes.pop("memory", (24, 14, 12))
    return Facts(
        Description(name=name, **{**network, **changes}), ActivationMemory(*(int(m * MIB) for m in memory)), list(tags)
    )


def an_entry(name: str = "petra_a", weights: Mapping[str, Reference | None] | None = None, **changes: Any) -> Entry:
    """A network with pretrained weights, whose memory is twice the network's."""
    tags = [
        Tag(f"{name}.{tag}", "org/name", "mit", (3, 224, 224), 10, figure) for tag, figure in (weights or {}).items()
    ]
    doubled = changes | {"memory": tuple(2 * m for m in changes.get("memory", (24, 14, 12)))}
    measured = [facts(tag.name, [tag], **doubled) for tag in tags if tag.reference]
    return Entry(facts(name, tags, **changes), measured)


def data(html: str) -> list[dict[str, Any]]:
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', html, flags=re.DOTALL)
    return json.loads(text)


def test_the_facts_are_in_the_table_without_a_script() -> None:
    html = render_page([an_entry(weights={"a1_in1k": None})])
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
    assert "top-1 %" not in render_page([an_entry()])
    assert ">weights<" not in render_page([an_entry()])


def test_accuracy_comes_with_its_weights_data_set_and_source_or_not_at_all() -> None:
    figures = {
        "unknown": None,
        "ours": Reference("digits", 99.25, "the committed result", True),
        "theirs": Reference("imagenet-1k", 70.5, "published by X", False),
    }
    html = render_page([an_entry(), an_entry("petra_b", figures)])
    assert '<div title="the committed result">99.25<small>ours, digits, measured here</small></div>' in html
    assert (
        '<div title="published by X">70.50<small>theirs, imagenet-1k, published with the source</small></div>' in html
    )
    without, known = (row["accuracy"] for row in data(html))
    assert without == []
    assert [(row["name"], row["dataset"], row["top1"]) for row in known] == [
        ("petra_b.ours", "digits", 99.25),
        ("petra_b.theirs", "imagenet-1k", 70.5),
    ]
    assert known[0]["memory"] == {"plain": 48 * MIB, "checkpointed": 28 * MIB, "reversible": 24 * MIB}


def test_words_of_others_cannot_become_markup() -> None:
    nasty = "</script><script>alert(1)</script>"
    html = render_page([an_entry(summary=nasty, weights={nasty: Reference(nasty, 1.0, nasty, False)})])
    assert "<script>alert" not in html
    assert data(html)[0]["accuracy"][0]["dataset"] == nasty


def test_the_file_refers_to_nothing_outside() -> None:
    html = render_page([an_entry()])
    assert "default-src 'none'" in html
    assert not re.findall(r"(?:src|href)\s*=\s*[\"'](?!data:|#)", html.replace("href: `#", ""))
    assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)|@import|url\(", html)


def test_list_html_writes_the_matching_networks(tmp_path: Path) -> None:
    done = petra_zoo("list", "petra_revnet_tiny", "--html", tmp_path / "site")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"saved {tmp_path / 'site' / 'index.html'}\n"
    assert [path.name for path in (tmp_path / "site").iterdir()] == ["index.html"]
    (row,) = data((tmp_path / "site" / "index.html").read_text(encoding="utf-8"))
    expected = entry("petra_revnet_tiny").network
    assert row["name"] == "petra_revnet_tiny"
    assert row["memory"] == expected.memory.as_dict()
    assert 0 < row["memory"]["reversible"] < row["memory"]["plain"]


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"cannot write .*index\.html"):
        write_page(["petra_revnet_tiny"], tmp_path / "file")


def test_somebody_elses_page_is_not_overwritten_but_an_earlier_one_is(tmp_path: Path) -> None:
    own = tmp_path / "index.html"
    own.write_text("<title>my home page</title>")
    with pytest.raises(UserError, match="is no page of petra-zoo: choose another directory"):
        write_page(["petra_revnet_tiny"], tmp_path)
    assert own.read_text() == "<title>my home page</title>"
    own.unlink()
    write_page([], tmp_path)
    write_page(["petra_revnet_tiny"], tmp_path)
    assert "petra_revnet_tiny" in own.read_text()
