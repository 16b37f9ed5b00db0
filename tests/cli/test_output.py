"""What a person sees on a terminal."""

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
