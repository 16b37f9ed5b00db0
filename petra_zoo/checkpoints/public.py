"""What of this machine may be published: names of models and files, never where they lie."""

from __future__ import annotations

import re
from pathlib import Path

from petra_zoo.settings.recipe import Recipe
from petra_zoo.strict_json import Json, JsonObject

ELSEWHERE = ("hf-hub:", "hf_hub:", "torchvision:", "http://", "https://")
LOCAL = "local-dir:"


def public_source(source: str) -> str:
    """A model's, file's or data set's name as it may be published: places of this machine lose all but the last name.

    ``hf-hub:ORG/NAME``, ``torchvision:MODEL.WEIGHT``, names of timm and of tags are everybody's and stay. A directory
    becomes ``local-dir:NAME``, so that it cannot be taken for a model of timm, and a file its name.
    """
    if source.startswith(ELSEWHERE):
        return source
    place = source.removeprefix(LOCAL)
    names = [name for name in re.split(r"[\\/]", place) if name not in ("", ".", "..", "~")]
    if names == [place]:  # no place at all, or one name already
        return source
    name = names[-1] if names else "checkpoint"
    is_file = Path(name).suffix != "" and not source.startswith(LOCAL) and not Path(place).is_dir()
    return name if is_file else LOCAL + name


def public_dataset(dataset: str) -> str:
    """A data set's name; what stands behind timm's ``hfds/``, ``wds/`` or ``tfds/`` may be a place of this machine."""
    kind, slash, name = dataset.partition("/")
    if not slash or is_hub_id(name) or not re.search(r"[\\/~]", name):
        return dataset
    return f"{kind}/{public_source(name).removeprefix(LOCAL)}"


def is_hub_id(name: str) -> bool:
    """Whether a name has the form of the Hub's: ORG/NAME."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None


def public_recipe(recipe: Recipe) -> Recipe:
    """A recipe without places of this machine: those that are paths are left out, those that name a model shortened."""
    values: JsonObject = {"dataset": public_dataset(recipe.dataset)}
    for name, value in recipe:
        if isinstance(value, Path):
            values[name] = None
        elif name in ("pretrained", "kd_model_name") and isinstance(value, str):
            values[name] = public_source(value)
        elif isinstance(value, dict):
            values[name] = without_places(value)
    return recipe.model_copy(update=values)


def public_record(record: JsonObject) -> JsonObject:
    """evaluation.json or fidelity.json: the names of model, source and data set, and not where the result was put."""
    public = {key: value for key, value in record.items() if key != "output"}
    for key, shorten in (("model", public_source), ("source", public_source), ("dataset", public_dataset)):
        if isinstance(value := record.get(key), str):
            public[key] = shorten(value)
    return public


def without_places(value: Json) -> Json:
    """JSON or YAML; every text that is the full path of a file or directory of this machine becomes its name."""
    if isinstance(value, dict):
        return {key: without_places(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_places(inner) for inner in value]
    if isinstance(value, str) and _is_a_place(value):
        return public_source(value)
    return value


def _is_a_place(text: str) -> bool:
    """Not every text with a slash in front is one: the labels of OpenImages look like /m/01g317."""
    path = Path(text.removeprefix(LOCAL))
    try:
        return path.expanduser().is_absolute() and path.expanduser().exists()
    except (OSError, RuntimeError, ValueError):  # too long, of an unknown user, with a null byte: no place
        return False
