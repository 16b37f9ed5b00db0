"""What the README promises."""

import re
from pathlib import Path

from typer.main import get_command

from petra_zoo.cli.main import app
from petra_zoo.settings.recipe_files import load_recipe

README = Path(__file__).parents[1] / "README.md"


def test_the_recipes_that_it_trains_are_there_and_take_its_settings() -> None:
    trained = re.findall(r"^petra-zoo train (\S+) (.*)", README.read_text(), flags=re.MULTILINE)
    assert trained
    for recipe, settings in trained:
        assert load_recipe(recipe, settings.split()).dataset == "folder"


def test_every_command_is_in_the_table() -> None:
    table = README.read_text().split("## Commands")[1].split("## More")[0]
    for name in get_command(app).commands:  # type: ignore[attr-defined]
        assert f"petra-zoo {name}" in table


def test_make_targets_named_in_the_readme_exist() -> None:
    makefile = (README.parent / "Makefile").read_text()
    for target in re.findall(r"^make (\S+)", README.read_text(), flags=re.MULTILINE):
        assert f"\n{target}:" in makefile
