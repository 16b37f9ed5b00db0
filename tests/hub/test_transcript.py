"""docs/hub.md is what the commands in it do."""

import re
from pathlib import Path

import pytest
from typer.main import get_command

from petra_zoo.cli.main import app
from tests.hub.write_transcript import PAGE, SOURCE, write
from tests.transcript import masked


def test_every_command_of_the_page_exists() -> None:
    named = set(re.findall(r"petra-zoo ([a-z]+)", PAGE.read_text(encoding="utf-8")))
    assert named <= set(get_command(app).commands)  # type: ignore[attr-defined]


def test_the_page_was_written_from_its_source() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for line in SOURCE.splitlines():
        assert line.strip() in page


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_page_is_what_its_commands_do(tmp_path: Path) -> None:
    assert masked(write(tmp_path)) == masked(PAGE.read_text(encoding="utf-8"))
