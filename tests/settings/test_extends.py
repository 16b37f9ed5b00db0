"""Recipes that extend others: what they come to, and what is refused."""

import json
from pathlib import Path

import pytest

from petra_zoo.errors import UserError
from petra_zoo.settings.recipe_files import (
    copy_recipe,
    list_recipes,
    load_recipe,
    override_recipe,
    recipe_text,
    save_recipe,
)

SNAPSHOT = json.loads((Path(__file__).parent / "recipes.json").read_text())
NETWORK = "model: petra_revnet_tiny\n"


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("name", sorted(SNAPSHOT))
def test_an_installed_recipe_says_what_it_said_when_it_stood_alone(name: str) -> None:
    """The settings that are no defaults, as they were before recipes could extend others: the paper's to this day."""
    assert load_recipe(name).model_dump(mode="json", exclude_defaults=True) == SNAPSHOT[name]


def test_every_installed_recipe_is_in_the_snapshot() -> None:
    assert list_recipes() == sorted(SNAPSHOT)


def test_bases_are_found_by_name_but_not_listed() -> None:
    assert not any(name.startswith("paper/") for name in list_recipes())
    assert "dataset: cifar10" in recipe_text("paper/cifar10")
    with pytest.raises(UserError, match=r"^model: required, but not given$"):
        load_recipe("paper/cifar10")


def test_a_file_extends_an_installed_recipe_and_overrides_come_last(tmp_path: Path) -> None:
    path = write(tmp_path / "own.yaml", "extends: digits/petra_revnet_tiny\nepochs: 3\nstages: 2\n")
    recipe = load_recipe(path, ["stages=7"])
    assert (recipe.dataset, recipe.epochs, recipe.stages) == ("digits", 3, 7)


def test_a_chain_of_files_beside_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "inner").mkdir()
    write(tmp_path / "first.yaml", "dataset: shapes\nepochs: 1\nseed: 1\nmodel_kwargs: {a: 1}\n")
    write(tmp_path / "inner" / "second.yaml", f"extends: ../first.yaml\n{NETWORK}epochs: 2\nmodel_kwargs: {{b: 2}}\n")
    write(tmp_path / "third.yaml", "extends: inner/second.yaml\nseed: 3\n")
    monkeypatch.chdir("/")
    recipe = load_recipe(str(tmp_path / "third.yaml"))
    assert (recipe.dataset, recipe.epochs, recipe.seed) == ("shapes", 2, 3)
    assert recipe.model_kwargs == {"b": 2}, "a mapping is one value"


@pytest.mark.parametrize(("mine", "lr", "lr_base"), [("lr: 0.3", 0.3, None), ("lr_base: 0.3", None, 0.3)])
def test_a_learning_rate_takes_the_place_of_the_bases(tmp_path: Path, mine: str, lr: float, lr_base: float) -> None:
    for its in ("lr: 0.1", "lr_base: 0.1"):
        write(tmp_path / "base.yaml", f"{NETWORK}dataset: shapes\n{its}\n")
        recipe = load_recipe(write(tmp_path / "own.yaml", f"extends: base.yaml\n{mine}\n"))
        assert (recipe.lr, recipe.lr_base) == (lr, lr_base)


def test_an_alias_takes_the_place_of_the_bases_setting(tmp_path: Path) -> None:
    path = write(tmp_path / "own.yaml", "extends: imagenet/petra_revnet18\ngrad_accum_steps: 8\n")
    assert load_recipe(path).accumulation_steps == 8


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a": "extends: a.yaml"}, r"extends itself: \S+/a\.yaml -> \S+/a\.yaml$"),
        ({"a": "extends: b.yaml", "b": "extends: ./a.yaml"}, r"extends itself: \S+/a\.yaml -> \S+/b\.yaml -> \S+/a\."),
        ({"a": "extends: paper/cifar11"}, r"a\.yaml extends another: unknown recipe 'paper/cifar11'; did you mean "
         "'paper/cifar10'"),
        ({"a": "extends: gone.yaml"}, r"a\.yaml extends another: recipe file \S+/gone\.yaml cannot be read"),
        ({"a": "extends: [x, y]"}, r"extends=\['x', 'y'\]: expected a recipe's name, or a \.yaml file beside it"),
        ({"a": "extends: b.yaml", "b": "- x"}, r"b\.yaml is not a YAML mapping"),
        ({"a": "extends: b.yaml", "b": "epoch: 3"}, r"b\.yaml: unknown setting 'epoch'; did you mean 'epochs'"),
    ],
)  # fmt: skip
def test_what_cannot_be_extended_is_one_line(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, text in files.items():
        write(tmp_path / f"{name}.yaml", text + "\n")
    with pytest.raises(UserError, match=message) as caught:
        load_recipe(str(tmp_path / "a.yaml"))
    assert "\n" not in str(caught.value)


def test_a_saved_recipe_stands_alone(tmp_path: Path) -> None:
    recipe = load_recipe("cifar10/petra_revnet18_cifar")
    save_recipe(recipe, tmp_path / "saved.yaml")
    assert "extends" not in (tmp_path / "saved.yaml").read_text()
    assert load_recipe(str(tmp_path / "saved.yaml")) == recipe


def test_a_copy_comes_to_the_same(tmp_path: Path) -> None:
    name = "cifar10/petra_revnet18_cifar"
    assert load_recipe(str(copy_recipe(name, tmp_path / "own.yaml"))) == load_recipe(name)
    write(tmp_path / "base.yaml", f"{NETWORK}dataset: shapes\n")
    path = write(tmp_path / "mine.yaml", "# a comment\nextends: base.yaml\nepochs: 3\n")
    copied = copy_recipe(path, tmp_path / "elsewhere" / "mine.yaml")
    assert copied.read_text().startswith("# a comment\n")
    assert load_recipe(str(copied)) == load_recipe(path)


@pytest.mark.parametrize(
    "text", ["epochs: 3\nextends: base.yaml", "{extends: base.yaml, epochs: 3}\n", "extends:\n  base.yaml\nepochs: 3\n"]
)
def test_a_copy_finds_its_base_however_that_is_written(tmp_path: Path, text: str) -> None:
    write(tmp_path / "base.yaml", f"{NETWORK}dataset: shapes\n")
    path = write(tmp_path / "mine.yaml", text)
    assert load_recipe(str(copy_recipe(path, tmp_path / "elsewhere" / "mine.yaml"))) == load_recipe(path)


def test_a_setting_under_both_of_its_names_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "own.yaml", f"{NETWORK}dataset: shapes\ngrad_accum_steps: 4\naccumulation_steps: 2\n")
    with pytest.raises(UserError, match=r"own\.yaml: grad_accum_steps and accumulation_steps are two names of one"):
        load_recipe(path)


def test_an_override_cannot_extend() -> None:
    with pytest.raises(UserError, match="only a recipe's file extends another"):
        load_recipe("digits/petra_revnet_tiny", ["extends=shapes/petra_revnet_tiny"])


def test_a_recipe_in_memory_is_overridden_like_a_file() -> None:
    recipe = load_recipe("digits/petra_revnet_tiny")
    assert override_recipe(recipe, ()) is recipe
    assert override_recipe(recipe, ["lr=0.3", "epochs=2"]) == load_recipe(
        "digits/petra_revnet_tiny", ["lr=0.3", "epochs=2"]
    )
    with pytest.raises(UserError, match="unknown setting 'epoch'"):
        override_recipe(recipe, ["epoch=3"])
    with pytest.raises(UserError, match="overrides are a list of KEY=VALUE"):
        override_recipe(recipe, "lr=0.3")
