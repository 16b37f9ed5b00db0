"""Recipes as files: finding, reading, overriding and saving them."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn

import yaml
from pydantic import ValidationError

from petra_zoo.errors import UserError
from petra_zoo.files import expand_home
from petra_zoo.settings.augmentation import Augmentation
from petra_zoo.settings.recipe import Recipe
from petra_zoo.settings.yaml12 import read_yaml, write_yaml

__all__ = [
    "Augmentation",
    "Recipe",
    "copy_recipe",
    "list_recipes",
    "load_recipe",
    "make_recipe",
    "recipe_text",
    "save_recipe",
]

# Two ways to say one thing: an override of one replaces the recipe's other.
_INSTEAD_OF = {"lr": "lr_base", "lr_base": "lr"}
_ALIASES = {"grad_accum_steps": "accumulation_steps"}


def list_recipes() -> list[str]:
    """Names the installed recipes, such as `digits/petra_revnet_tiny`, in alphabetical order."""
    root = resources.files("petra_zoo.recipes")
    return sorted(
        f"{folder.name}/{file.name.removesuffix('.yaml')}"
        for folder in root.iterdir()
        if folder.is_dir()
        for file in folder.iterdir()
        if file.name.endswith(".yaml")
    )


def recipe_text(name_or_path: str) -> str:
    """Gives the YAML text of an installed recipe, or of a file.

    Raises:
        UserError: There is no such recipe or file.
    """
    names = list_recipes()
    if name_or_path in names:
        return resources.files("petra_zoo.recipes").joinpath(f"{name_or_path}.yaml").read_text(encoding="utf-8")
    path = Path(expand_home(name_or_path))
    if path.suffix not in (".yaml", ".yml"):
        raise UserError(
            f"unknown recipe '{name_or_path}'; did you mean {_nearest(name_or_path, names)}? (or give a .yaml file)"
        )
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"recipe file {path} cannot be read: {error}") from error


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe and applies overrides to it.

    Args:
        name_or_path: An installed recipe's name, or the path of a `.yaml` file.
        overrides: `KEY=VALUE` each, the value in YAML: `lr=0.1`, `split=[2,3]`, `data_dir=null`. Later ones win.

    Raises:
        UserError: The recipe does not exist, is not a YAML mapping, has an unknown setting or a wrong value.
    """
    try:
        settings = read_yaml(recipe_text(name_or_path))
    except yaml.YAMLError as error:
        raise UserError(f"recipe {name_or_path} is not valid YAML: {_one_line(error)}") from error
    if not isinstance(settings, dict):
        raise UserError(f"recipe {name_or_path} is not a YAML mapping; expected lines of KEY: VALUE")
    merged = _known(settings)
    for override in overrides:
        chosen = _known(dict([_parse_override(override)]))
        for key in chosen:
            merged.pop(_INSTEAD_OF.get(key, ""), None)
        merged |= chosen
    return make_recipe(merged)


def make_recipe(settings: Mapping[str, Any]) -> Recipe:
    """Validates settings, as read from YAML, into a recipe.

    Raises:
        UserError: A setting is unknown or its value is wrong; the message names key, value and what was expected.
    """
    known = _known(settings)
    try:
        return Recipe.model_validate(known)
    except ValidationError as error:
        _refuse(error, known)


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Writes all settings of a recipe as YAML; `load_recipe` gives an equal recipe back."""
    own = [key for key in Recipe.model_fields if key not in Augmentation.model_fields]
    values = recipe.model_dump(mode="json")
    ordered = {key: values[key] for key in [*own, *Augmentation.model_fields]}
    path.write_text(write_yaml(ordered), encoding="utf-8")


def copy_recipe(name: str, destination: Path, *, force: bool = False) -> Path:
    """Copies a recipe, comments included, to a file, or into a folder under its own name; makes missing folders.

    Returns:
        The file written.

    Raises:
        UserError: There is no such recipe, or the file exists and `force` is not set.
    """
    text = recipe_text(name)
    destination = Path(expand_home(str(destination)))
    if destination.is_dir():
        destination /= f"{Path(name).stem}.yaml"
    if destination.exists() and not force:
        raise UserError(f"{destination} exists; choose another name, or overwrite it with --force")
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        destination.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{destination} cannot be written: {error}") from error
    return destination


def _parse_override(override: str) -> tuple[str, Any]:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"override '{override}' is not KEY=VALUE, such as lr=0.1")
    try:
        return key.strip(), read_yaml(text)
    except yaml.YAMLError as error:
        raise UserError(f"override '{override}': the value is not valid YAML: {_one_line(error)}") from error


def _known(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Resolves aliases before anything is merged, so that an override by alias replaces the recipe's own value."""
    known = {_ALIASES.get(key, key): value for key, value in settings.items()}
    for key in known:
        if key not in Recipe.model_fields:
            raise UserError(f"unknown setting '{key}'; did you mean {_nearest(str(key), Recipe.model_fields)}?")
    return known


def _nearest(name: str, names: Iterable[str]) -> str:
    candidates = list(names)
    near = difflib.get_close_matches(name, candidates, n=1) or difflib.get_close_matches(name, candidates, 1, 0)
    return f"'{near[0]}'"


def _refuse(error: ValidationError, settings: Mapping[str, Any]) -> NoReturn:
    """Says what pydantic found in one line: its own text takes several lines per setting and names its classes."""
    found: dict[str, list[str]] = {}
    for item in error.errors(include_url=False):
        # A finding without a place is about several settings together, and names them itself.
        key, *inside = item["loc"] or [""]
        where = "".join(f"entry {part}: " for part in inside)
        found.setdefault(str(key), []).append(where + _expected(item["type"], item["msg"]))
    lines = []
    for key, expected in found.items():
        given = f"{key}={settings[key]!r}: " if key in settings else f"{key}: " if key else ""
        lines.append(given + " or ".join(expected))
    raise UserError("; ".join(lines)) from error


def _expected(kind: str, message: str) -> str:
    if kind == "missing":
        return "required, but not given"
    if kind == "path_type":
        return "expected a path"
    for pydantic_words, ours in {
        "Value error, ": "",
        "Input should be": "expected",
        "String should match pattern": "expected text of the form",
        "a valid tuple": "a list",
    }.items():
        message = message.replace(pydantic_words, ours, 1)
    return message


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
