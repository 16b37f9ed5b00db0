"""Every setting of a recipe in a line: what it takes, its default, what it means, by the classes' docstrings."""

from __future__ import annotations

import fnmatch
import inspect
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from pydantic import BaseModel

from petra_zoo.settings.augmentation import Augmentation
from petra_zoo.settings.recipe import Recipe
from petra_zoo.settings.types import LARGEST, SaveInterval
from petra_zoo.strict_json import Json, JsonObject, to_json

_PAGE = """# All settings of a recipe

    petra-zoo recipes settings              # this list; with a recipe's name, its values in the place of the defaults
    petra-zoo recipes settings --markdown   # this page

<!-- not measured -->
| setting | takes | default | meaning |
|---|---|---|---|"""


class Setting(NamedTuple):
    """A setting.

    Attributes:
        takes: the values that it may have, in words.
        value: the default, or what a recipe says; None where it has to be given.
        meaning: one line.
    """

    name: str
    takes: str
    value: str | None
    meaning: str


def described_settings(recipe: Recipe | None = None) -> list[Setting]:
    """All settings, the network's first; with the values of a recipe, or else their defaults."""
    schema: JsonObject = Recipe.model_json_schema()["properties"]
    own = [name for name in Recipe.model_fields if name not in Augmentation.model_fields]
    meanings = {**_meanings(Augmentation), **_meanings(Recipe)}
    values = {} if recipe is None else recipe.model_dump(mode="json")
    found = []
    for name in [*own, *Augmentation.model_fields]:
        field = Recipe.model_fields[name]
        default = None if field.is_required() else to_json(_plain(field.get_default(call_default_factory=True)))
        value = to_json(values[name]) if name in values else default
        found.append(Setting(name, _takes(schema[name]), value and value.strip('"'), meanings.get(name, "")))
    return found


def settings_page(settings: Sequence[Setting]) -> str:
    """All settings as a page in Markdown."""
    rows = [
        f"| `{one.name}` | {one.takes} | {'required' if one.value is None else f'`{one.value}`'} | {one.meaning} |"
        for one in settings
    ]
    return "\n".join([_PAGE, *rows, ""])


def _plain(value: Json | SaveInterval) -> Json:
    return str(value) if isinstance(value, SaveInterval) else value


def _meanings(kind: type[BaseModel]) -> dict[str, str]:
    """What the section Attributes of a class' docstring says, name by name."""
    section = (inspect.getdoc(kind) or "").partition("Attributes:\n")[2]
    said = re.findall(r"^ {4}(\w[\w*, ]*): (.*(?:\n {8}.*)*)", section, flags=re.MULTILINE)
    found = {}
    for names, text in said:
        for pattern in names.split(", "):
            for name in fnmatch.filter(kind.model_fields, pattern):
                found[name] = " ".join(text.split())
    return found


def _takes(schema: Json) -> str:
    """A JSON schema in words."""
    if not isinstance(schema, Mapping):
        return "anything"
    if isinstance(either := schema.get("anyOf"), list):
        return " or ".join(_takes(one) for one in either)
    if isinstance(words := schema.get("enum"), list):
        return ", ".join(str(word) for word in words)
    if "const" in schema:
        return str(schema["const"])
    kind = str(schema.get("type", "text"))  # what is read in a way of its own is written as text
    if kind in ("integer", "number"):
        return ("a whole number" if kind == "integer" else "a number") + _range(schema)
    return {"boolean": "true, false", "string": "text", "array": "a list", "object": "a mapping"}.get(kind, kind)


def _range(schema: Mapping[str, Json]) -> str:
    bounds = (("minimum", "from"), ("exclusiveMinimum", "above"), ("maximum", "to"), ("exclusiveMaximum", "below"))
    said = ((schema.get(key), word) for key, word in bounds)
    return "".join(f" {word} {number:g}" for number, word in said if number is not None and number != LARGEST)
