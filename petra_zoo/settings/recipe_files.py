"""Recipes as files: finding, reading, extending, overriding and saving them."""

import os
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import NoReturn

import yaml
from pydantic import ValidationError

from petra_zoo.errors import UserError
from petra_zoo.files import expand_home
from petra_zoo.settings.augmentation import Augmentation
from petra_zoo.settings.merging import Settings, did_you_mean, in_one_line, known_names, lay_over, override
from petra_zoo.settings.recipe import Recipe
from petra_zoo.settings.yaml12 import read_yaml, write_yaml
from petra_zoo.strict_json import Json

__all__ = [
    "Augmentation",
    "Recipe",
    "copy_recipe",
    "list_recipes",
    "load_recipe",
    "make_recipe",
    "override_recipe",
    "recipe_settings",
    "recipe_text",
    "recipe_yaml",
    "save_recipe",
]

EXTENDS = "extends"
_BASES = "paper"  # the folder of recipes that are not complete: for others to extend, not to train by
_FILES = (".yaml", ".yml")


def list_recipes() -> list[str]:
    """Names the installed recipes, such as `digits/petra_revnet_tiny`, in alphabetical order."""
    return [name for name in _installed() if not name.startswith(f"{_BASES}/")]


def recipe_text(name_or_path: str) -> str:
    """Gives the YAML text of an installed recipe, or of a file.

    Raises:
        UserError: There is no such recipe or file.
    """
    names = _installed()
    if name_or_path in names:
        return resources.files("petra_zoo.recipes").joinpath(f"{name_or_path}.yaml").read_text(encoding="utf-8")
    path = Path(expand_home(name_or_path))
    if (path / "recipe.yaml").is_file():
        raise UserError(f"{name_or_path} is the directory of a run; its recipe is {path / 'recipe.yaml'}")
    if path.suffix not in _FILES:
        likely = names if name_or_path.startswith(f"{_BASES}/") else list_recipes()
        hint = did_you_mean(name_or_path, likely, "petra-zoo recipes ls lists all")
        raise UserError(f"unknown recipe '{name_or_path}'; {hint} (or give a .yaml file)")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"recipe file {path} cannot be read: {error}") from error


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe, lays it over the one it extends, and applies overrides.

    Args:
        name_or_path: An installed recipe's name, or the path of a `.yaml` file.
        overrides: `KEY=VALUE` each, the value in YAML: `lr=0.1`, `split=[2,3]`, `data_dir=null`. Later ones win.

    Raises:
        UserError: The recipe or its base does not exist, is not a YAML mapping, has an unknown setting or a wrong
            value, or extends itself.
    """
    return make_recipe(override(recipe_settings(name_or_path), overrides))


def recipe_settings(name: str, below: tuple[str, ...] = ()) -> Settings:
    """What a recipe's file says, laid over what the recipes say that it extends; no value is checked.

    Args:
        name: An installed recipe's name, or the path of a `.yaml` file.
        below: The recipes that led here, each extending the next.

    Raises:
        UserError: The recipe or its base does not exist, is not a YAML mapping, has an unknown setting, or extends
            itself.
    """
    this = str(Path(expand_home(name)).resolve()) if name.endswith(_FILES) else name
    if this in below:
        raise UserError(f"recipe {name} extends itself: {' -> '.join([*below[below.index(this) :], this])}")
    try:
        text = recipe_text(name)
    except UserError as error:
        if not below:
            raise
        raise UserError(f"recipe {below[-1]} extends another: {error}") from error
    settings = _mapping(name, text)
    base = _base_of(settings, name)
    try:
        own = known_names({key: value for key, value in settings.items() if key != EXTENDS})
    except UserError as error:  # several files may have led here: which one has it?
        raise UserError(f"recipe {name}: {error}") from error
    return own if base is None else lay_over(recipe_settings(base, (*below, this)), own)


def make_recipe(settings: Mapping[str, Json]) -> Recipe:
    """Validates settings, as read from YAML, into a recipe.

    Raises:
        UserError: A setting is unknown or its value is wrong; the message names key, value and what was expected.
    """
    known = known_names(settings)
    try:
        return Recipe.model_validate(known)
    except ValidationError as error:
        _refuse(error, known)


def override_recipe(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """A recipe with overrides applied; see `load_recipe`.

    Raises:
        UserError: One is unknown or wrong.
    """
    return make_recipe(override(recipe.model_dump(mode="json"), overrides)) if overrides else recipe


def recipe_yaml(recipe: Recipe) -> str:
    """All settings of a recipe as YAML, the network first; a comment says what follows from others."""
    own = [key for key in Recipe.model_fields if key not in Augmentation.model_fields]
    values = recipe.model_dump(mode="json")
    text = write_yaml({key: values[key] for key in [*own, *Augmentation.model_fields]})
    by = "update_size" if recipe.max_delay is None else "update_size and max_delay"
    for name in recipe.decided:
        text = text.replace(f"\n{name}: null\n", f"\n{name}: null  # {getattr(recipe, name)}, by {by}\n", 1)
    return text


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Writes all settings of a recipe as YAML; `load_recipe` gives an equal recipe back."""
    path.write_text(recipe_yaml(recipe), encoding="utf-8")


def copy_recipe(name: str, destination: str | Path, *, force: bool = False) -> Path:
    """Copies a recipe, comments included, to a file, or into a folder (`DIR/`) under its own name; makes missing ones.

    What it extends stays where it is: installed ones have a name, and that of a file is written out. Where that cannot
    be done by changing one line, the comments are lost.

    Returns:
        The file written.

    Raises:
        UserError: There is no such recipe, or the file exists and `force` is not set.
    """
    text = recipe_text(name)
    as_folder = str(destination).endswith(("/", os.sep))
    destination = Path(expand_home(str(destination)))
    if as_folder or destination.is_dir():
        destination /= f"{Path(name).stem}.yaml"
    elif not destination.name.endswith(_FILES):  # under another ending, nothing would take it for a recipe
        destination = destination.with_name(f"{destination.name}.yaml")
    if destination.exists() and not force:
        raise UserError(f"{destination} exists; choose another name, or overwrite it with --force")
    settings = _mapping(name, text)
    base = _base_of(settings, name)
    if base is not None and base.endswith(_FILES):
        text = _extending(text, settings | {EXTENDS: str(Path(base).resolve())})
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        destination.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{destination} cannot be written: {error}") from error
    return destination


def _extending(text: str, wanted: Settings) -> str:
    """A recipe's text, changed to extend what the wanted settings say."""
    line = write_yaml({EXTENDS: wanted[EXTENDS]}).removesuffix("\n")
    changed = re.sub(rf"^{EXTENDS}:.*$", lambda _: line, text, flags=re.MULTILINE)
    try:
        if read_yaml(changed) == wanted:
            return changed
    except yaml.YAMLError:
        pass
    return write_yaml(wanted)  # it was no line of its own


def _installed() -> list[str]:
    """The installed recipes and what they extend."""
    root = resources.files("petra_zoo.recipes")
    return sorted(
        f"{folder.name}/{file.name.removesuffix('.yaml')}"
        for folder in root.iterdir()
        if folder.is_dir()
        for file in folder.iterdir()
        if file.name.endswith(".yaml")
    )


def _mapping(name: str, text: str) -> Settings:
    try:
        settings = read_yaml(text)
    except yaml.YAMLError as error:
        raise UserError(f"recipe {name} is not valid YAML: {in_one_line(error)}") from error
    if not isinstance(settings, dict):
        raise UserError(f"recipe {name} is not a YAML mapping; expected lines of KEY: VALUE")
    return settings


def _base_of(settings: Settings, name: str) -> str | None:
    """The recipe that one extends: a name, or the path of a file that stands beside it."""
    base = settings.get(EXTENDS)
    if base is None:
        return None
    if not isinstance(base, str):
        raise UserError(f"recipe {name}: extends={base!r}: expected a recipe's name, or a .yaml file beside it")
    if not base.endswith(_FILES):
        return base
    return str(Path(expand_home(name)).parent / expand_home(base))


def _refuse(error: ValidationError, settings: Mapping[str, Json]) -> NoReturn:
    """Says what pydantic found in one line: its own text takes several lines per setting and names its classes."""
    found: dict[str, list[str]] = {}
    for item in error.errors(include_url=False):
        # A finding without a place is about several settings together, and names them itself.
        key, *inside = item["loc"] or [""]
        where = "".join(f"entry {part}: " for part in inside)
        found.setdefault(str(key), []).append(where + in_our_words(item["type"], item["msg"]))
    lines = []
    for key, expected in found.items():
        given = f"{key}={settings[key]!r}: " if key in settings else f"{key}: " if key else ""
        lines.append(given + " or ".join(expected))
    raise UserError("; ".join(lines)) from error


def in_our_words(kind: str, message: str) -> str:
    """What pydantic expected, as our error messages say it."""
    if kind == "missing":
        return "required, but not given"
    if kind == "path_type":
        return "expected a path"
    if kind in {"dict_type", "model_type"}:  # pydantic names classes of ours
        return "expected a mapping, lines of KEY: VALUE"
    if kind == "too_short":
        return "expected at least one entry"
    if kind == "invalid-json-value":
        return "expected text, a number, true, false, null, a list or a mapping"
    for pydantic_words, ours in {
        "Value error, ": "",
        "Input should be": "expected",
        "String should match pattern": "expected text of the form",
        "a valid tuple": "a list",
    }.items():
        message = message.replace(pydantic_words, ours, 1)
    return message
