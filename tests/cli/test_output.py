"""What a person sees on a terminal."""

import re

import pytest

from petra_zoo.cli.output import print_table

NAMES = [f"petra_a_network_with_a_long_name_{i}" for i in range(3)]


@pytest.mark.parametrize("width", ["40", "80", "200"])
def test_names_are_never_cut_off(
    width: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", width)
    print_table(("name", "licence", "weights"), [(name, "apache-2.0", f"timm/{name}") for name in NAMES])
    shown = capsys.readouterr().out
    assert all(name in shown and f"timm/{name}" in shown for name in NAMES)
    assert "…" not in shown


@pytest.mark.parametrize(("width", "is_table"), [(100, True), (66, True), (40, False)])
def test_what_a_terminal_shows_is_no_wider_than_it(
    width: int, is_table: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", str(width))
    rows = [(name, "apache-2.0", "", "weights here") for name in NAMES]
    print_table(("name", "licence", "tag", "from"), rows)
    lines = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out).splitlines()
    assert max(map(len, lines)) <= width
    assert any(line.split()[:2] == ["name", "licence"] for line in lines) is is_table
    assert is_table or "  licence apache-2.0, from weights here" in lines


def test_a_plain_table_has_a_row_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("class", "share"), [("a cat\nor\ttwo", "1.0"), ("dog", "0.5")])
    assert capsys.readouterr().out == "class\tshare\na cat or two\t1.0\ndog\t0.5\n"
