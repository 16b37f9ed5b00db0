"""What a shell offers while a command is typed. It is asked at every TAB: nothing here imports torch or timm."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Literal, get_args, get_origin

import typer

from petra_zoo.strict_json import to_json

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

# What is registered by name, and how the sources say so: reading them takes no time, importing them takes seconds.
_MODEL = r"^@register_model\s+def (\w+)"
_TWINS = ("vision_transformer", "vision_transformer_hybrid", "deit", "eva", "beit")  # timm's, each with a name of ours
_REGISTERED = {
    "model": ("models/*.py", _MODEL),
    "method": ("petra/methods.py", r"^register_method\(\s*Method\(\s*\"(\w+)\""),
    "dataset": ("data/datasets.py", r"^@register_dataset\(\"(\w+)\""),
    "loss": ("training/losses.py", r"^register_loss\(\"(\w+)\""),
}


def complete_recipe(incomplete: str) -> list[str]:
    """Installed recipes; a shell offers files where none fits."""
    from petra_zoo.settings.recipe_files import list_recipes

    return [name for name in list_recipes() if name.startswith(incomplete)]


def complete_model(incomplete: str) -> list[str]:
    """Networks of the zoo."""
    return [name for name in _models() if name.startswith(incomplete)]


def complete_source(incomplete: str) -> list[str]:
    """Networks that `petra-zoo convert` begins with: timm's."""
    return [name for name in _registered_in("timm", "models/*.py", _MODEL) if name.startswith(incomplete)]


def complete_setting(ctx: typer.Context, incomplete: str) -> list[str]:
    """Settings of a recipe, and the values that one takes."""
    from petra_zoo.settings.recipe import Recipe

    key, equals, _ = incomplete.partition("=")
    if equals:
        return [f"{key}={value}" for value in _values(key)]
    # bash takes KEY=VALUE for three words, and shows us the last one alone.
    before = [word for word in ctx.params.get("overrides") or [] if word != "="]
    if before and before[-1] in Recipe.model_fields:
        return _values(before[-1])
    keys = [key for key in Recipe.model_fields if key.startswith(incomplete)]
    if len(keys) == 1:  # several words, so that the shell goes on behind KEY= and puts no space there
        return [f"{keys[0]}={value}" for value in ("", *_values(keys[0]))]
    return [f"{key}=" for key in keys]


def _models() -> list[str]:
    twins = (f"petra_{name}" for family in _TWINS for name in _registered_in("timm", f"models/{family}.py", _MODEL))
    return sorted([*_registered_in("petra_zoo", *_REGISTERED["model"]), *twins])


def _registered_in(package: str, files: str, pattern: str) -> list[str]:
    found = find_spec(package)
    folders = found.submodule_search_locations if found else None
    texts = (path.read_text(encoding="utf-8") for folder in folders or () for path in Path(folder).glob(files))
    return sorted(name for text in texts for name in re.findall(pattern, text, re.MULTILINE))


def _values(key: str) -> list[str]:
    """What a setting takes: all of it where it is one of a few words, else its default as an example."""
    from petra_zoo.settings.recipe import Recipe

    if key == "model":
        return _models()
    if key in _REGISTERED:
        return _registered_in("petra_zoo", *_REGISTERED[key])
    field = Recipe.model_fields.get(key)
    if field is None or field.is_required():
        return []
    default = field.get_default(call_default_factory=True)
    example = default if isinstance(default, str) else to_json(default)
    return list(dict.fromkeys([*_words(field), example]))


def _words(field: FieldInfo) -> Iterator[str]:
    """The few words that a setting takes: those of its Literal, and those for truth and nothing."""
    kinds = [field.annotation]
    for kind in kinds:
        if kind is bool:
            yield from ("true", "false")
        elif kind is NoneType:
            yield "null"
        elif get_origin(kind) is Literal:
            yield from map(str, get_args(kind))
        else:
            kinds.extend(get_args(kind))  # the parts of a union
