"""docs/your_images.md is what the commands in it do."""

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from petra_zoo.cli.main import app
from petra_zoo.settings.recipe_files import list_recipes, load_recipe
from tests.drawn_folder import CLASSES
from tests.transcript import commands_of, masked
from tests.your_images import PAGE, PICTURES, SOURCE, write

COMMANDS = [
    shlex.split(command.replace("\\\n", " ").split(" | ")[0])[1:]
    for command in commands_of(SOURCE)
    if command.startswith("petra-zoo ")
]


def test_the_page_was_written_from_its_source() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert [line for line in SOURCE.splitlines() if line.strip() not in page] == []


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_of_the_page_is_understood(words: list[str]) -> None:
    """Parsed with its options and arguments; nothing is run."""
    group = get_command(app)
    context = group.make_context("petra-zoo", list(words))
    while hasattr(group, "resolve_command"):
        name, group, words = group.resolve_command(context, words)
        context = group.make_context(name, list(words), parent=context)
    assert context.args == []


def test_every_recipe_of_the_page_is_there_and_takes_the_settings() -> None:
    for words in COMMANDS:
        settings = [word for word in words if re.match(r"[a-z_]+=", word)]
        for word in words:
            if word in list_recipes():
                load_recipe(word, settings)
    named = set(re.findall(r"`(\w+/\w+)`", PAGE.read_text(encoding="utf-8")))
    assert named <= set(list_recipes())


def test_its_pictures_are_there_and_small() -> None:
    for path in PICTURES.values():
        assert path.stat().st_size < 100_000


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_page_is_what_its_commands_do(tmp_path: Path) -> None:
    assert masked(write(tmp_path), CLASSES) == masked(PAGE.read_text(encoding="utf-8"), CLASSES)
