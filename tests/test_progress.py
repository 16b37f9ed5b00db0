"""The bar beside long work: on a terminal alone, and only once it takes long."""

import io

import pytest
from rich.console import Console

from petra_zoo import progress


def shown(monkeypatch: pytest.MonkeyPatch, *, after: float, terminal: bool) -> str:
    monkeypatch.setattr(progress, "SHOWN_AFTER", after)
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=80)
    assert list(progress.tracked(iter(range(5)), "reading", 5, console)) == list(range(5))
    return text.getvalue()


def test_long_work_has_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "reading" in shown(monkeypatch, after=-1.0, terminal=True)


def test_short_work_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "reading" not in shown(monkeypatch, after=1e9, terminal=True)


def test_a_pipe_gets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(monkeypatch, after=-1.0, terminal=False) == ""
