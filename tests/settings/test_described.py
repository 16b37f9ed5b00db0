"""Settings can be found: each has a line."""

from pathlib import Path

import pytest

from petra_zoo.settings.described import described_settings, settings_page
from petra_zoo.settings.recipe import Recipe
from petra_zoo.settings.recipe_files import load_recipe

ROOT = Path(__file__).parents[2]


def test_every_setting_is_listed_once_with_its_meaning() -> None:
    settings = described_settings()
    assert sorted(setting.name for setting in settings) == sorted(Recipe.model_fields)
    assert [setting.name for setting in settings if not setting.meaning] == []


@pytest.mark.parametrize(
    ("name", "takes", "value"),
    [
        ("model", "text", None),
        ("seed", "a whole number from 0", "42"),
        ("drop", "a number from 0 to 1", "0.0"),
        ("sync_bn", "true, false", "false"),
        ("last_stage", "graph, recompute", "graph"),
        ("lr", "a number above 0 or null", "null"),
        ("checkpoint_every", "text or null", "1 epoch"),
    ],
)
def test_a_setting_says_what_it_takes(name: str, takes: str, value: str | None) -> None:
    (setting,) = [one for one in described_settings() if one.name == name]
    assert (setting.takes, setting.value) == (takes, value)


def test_a_recipes_values_stand_in_the_place_of_defaults() -> None:
    recipe = load_recipe("digits/petra_revnet_tiny", ["seed=7"])
    assert {one.name: one.value for one in described_settings(recipe)}["seed"] == "7"


def test_the_page_in_docs_is_what_the_command_prints() -> None:
    assert (ROOT / "docs" / "settings.md").read_text(encoding="utf-8") == settings_page(described_settings())
