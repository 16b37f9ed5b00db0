"""The YAML file that says what an accuracy study compares."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, NoReturn

import yaml
from pydantic import BaseModel, ConfigDict, Field, JsonValue, TypeAdapter, ValidationError

from petra_zoo.bench.accuracy_plan import AccuracyPlan, Contender, Search
from petra_zoo.errors import UserError
from petra_zoo.files import expand_home
from petra_zoo.settings.merging import Settings, did_you_mean, in_one_line, known_names, lay_over
from petra_zoo.settings.recipe_files import in_our_words, make_recipe, recipe_settings
from petra_zoo.settings.types import AtLeastOne, Count, NotNegative
from petra_zoo.settings.yaml12 import read_yaml
from petra_zoo.strict_json import Json

BUILT_IN = "methods.yaml"
_OURS = {"seed": "say seeds: beside the contenders", "output": "a study keeps no run directories"}
_SEEDS_ARE = "expected a number, or a list of seeds"
_Given = dict[str, JsonValue]
_Seeds = AtLeastOne | Annotated[list[Count], Field(min_length=1)]
_JSON, _SEEDS = TypeAdapter(_Given), TypeAdapter[int | list[int]](_Seeds)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Task(_Section):
    """What all contenders are trained on: a recipe and settings laid over it."""

    recipe: str
    settings: _Given = {}


class SearchSection(_Section):
    """Learning rates are tried first; see `petra_zoo.bench.accuracy_plan.Search`."""

    seed: Count = 1000
    settings: _Given = {}
    double_above: NotNegative | None = None


class StudyFile(_Section):
    """What a study file says.

    Attributes:
        name: of the study; None for the file's.
        recipe, settings: that all contenders start from.
        tasks: several of those, by name; every contender is trained on each.
        seeds: which, or how many from 0 on.
        search: how a contender with a list for `lr` gets its learning rate.
        probe: measure every stage's gradient against the exact one every so many micro-batches.
        contenders: by name, the settings laid over the recipe's. Beside them: `lr` may be a list; `lr_of` names the
            contender whose search decides; `paired_with` the one whose seeds it is compared with; `seeds` are its own.
    """

    name: str | None = None
    recipe: str | None = None
    settings: _Given = {}
    tasks: dict[str, Task] = {}
    seeds: _Seeds = 3
    search: SearchSection | None = None
    probe: AtLeastOne | None = None
    contenders: Annotated[dict[str, _Given | None], Field(min_length=1)]


def load_study(path: Path | None, *, seeds: int | None = None) -> AccuracyPlan:
    """Reads a study file and checks every setting in it.

    Args:
        path: of the file; None for the small study that comes with the package.
        seeds: how many, in place of the file's.

    Raises:
        UserError: it cannot be read, or says something that no run could do; names the nearest where a name is wrong.
    """
    if path is None:
        text, name = resources.files("petra_zoo.bench").joinpath(BUILT_IN).read_text(encoding="utf-8"), "methods"
    else:
        try:
            text, name = Path(expand_home(str(path))).read_text(encoding="utf-8"), path.stem
        except OSError as error:
            raise UserError(f"study file {path} cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise UserError(f"study file {path} is no text: {error}") from error
    try:
        return resolve_study(_parse(text), name, seeds)
    except UserError as error:
        raise UserError(f"study {name}: {error}") from error


def resolve_study(file: StudyFile, called: str, seeds: int | None = None) -> AccuracyPlan:
    """Resolves what a study file says.

    Raises:
        UserError: a setting is unknown or wrong, or a contender names another that there is not.
    """
    if bool(file.recipe) == bool(file.tasks):
        raise UserError("expected one of recipe and tasks")
    tasks = file.tasks or {"": Task(recipe=str(file.recipe))}
    contenders = [
        _contender(label, given or {}, name, task, file, seeds)
        for name, task in tasks.items()
        for label, given in file.contenders.items()
    ]
    if len({contender.name for contender in contenders}) < len(contenders):
        raise UserError("a contender on a task has the name of another on another task: rename one")
    search = None if file.search is None else Search.model_validate(file.search.model_dump())
    return AccuracyPlan(name=file.name or called, contenders=tuple(contenders), search=search, probe=file.probe)


def _parse(text: str) -> StudyFile:
    try:
        content = read_yaml(text)
    except yaml.YAMLError as error:
        raise UserError(f"not valid YAML: {in_one_line(error)}") from error
    if not isinstance(content, dict):
        raise UserError("not a YAML mapping; expected lines of KEY: VALUE")
    try:
        return StudyFile.model_validate(content)
    except ValidationError as error:
        _refuse(error, content)


def _refuse(error: ValidationError, content: Mapping[str, Json]) -> NoReturn:
    first = error.errors(include_url=False)[0]
    parts = [str(part) for part in first["loc"]]
    where = ": ".join(parts)
    if first["type"] == "extra_forbidden":
        sections: dict[str, type[_Section]] = {"search": SearchSection, "tasks": Task}
        section = sections.get(parts[0], StudyFile)
        raise UserError(f"unknown key '{where}'; {did_you_mean(parts[-1], section.model_fields)}") from error
    if parts[0] == "seeds":  # one of two types: pydantic would name its own name of the first
        raise UserError(f"seeds={content['seeds']!r}: {_SEEDS_ARE}") from error
    if parts[-1] == "[key]":
        raise UserError(f"{': '.join(parts[:-1])}: expected text in the place of this key") from error
    raise UserError(f"{where}: {in_our_words(first['type'], first['msg'])}") from error


def _contender(
    label: str, given: Mapping[str, Json], task_name: str, task: Task, file: StudyFile, seeds: int | None
) -> Contender:
    """A contender on a task.

    Raises:
        UserError: says which contender is wrong, and how.
    """
    own = dict(given)
    paired_with = _other(own.pop("paired_with", None), "paired_with", label, file)
    rates_of = _other(own.pop("lr_of", None), "lr_of", label, file)
    listed_seeds = _seeds(own.pop("seeds", file.seeds), label, seeds)
    rates: list[Json] = []
    if isinstance(listed := own.get("lr"), list):
        if not listed or None in listed or any(rate in listed[:place] for place, rate in enumerate(listed)):
            raise UserError(f"contender '{label}': lr={listed}: expected learning rates to choose from, each once")
        rates = listed
        del own["lr"]
    try:
        settings = _laid(file.settings, task.settings, own)
        if rates and file.search is None:
            raise UserError("a list for lr needs a section 'search'")
        if (rates or "lr" in own) and rates_of:
            raise UserError("lr and lr_of are both given: give one of them")
        if rates_of and not isinstance((file.contenders[rates_of] or {}).get("lr"), list):
            raise UserError(f"lr_of: '{rates_of}' has no list for lr")
        under_search = _laid(file.search.settings) if file.search and rates else {}
        if under_search.keys() & {"lr", "lr_base"}:  # every rate would be tried as this one
            raise UserError("search: settings: lr and lr_base are what is searched: leave them out")
        for rate in rates or [None]:
            with_rate = settings if rate is None else lay_over(settings, {"lr": rate})
            recipe = make_recipe(lay_over(recipe_settings(task.recipe), with_rate))
            make_recipe(lay_over(recipe_settings(task.recipe), lay_over(with_rate, under_search)))
    except UserError as error:
        raise UserError(f"contender '{label}': {error}") from error
    name = _name(label, task_name)
    return Contender(
        name=name,
        label=label,
        task=task_name,
        recipe=task.recipe,
        settings=_JSON.validate_python(settings),
        seeds=listed_seeds,
        rates=tuple(float(str(rate)) for rate in rates),
        rates_of=_name(rates_of, task_name) if rates_of else name if rates else "",
        paired_with=_name(paired_with, task_name) if paired_with else "",
        method=recipe.method,
        opt=recipe.opt,
        stages=recipe.stages,
        delay=recipe.delay[0],
    )


def _seeds(given: Json, label: str, count: int | None) -> tuple[int, ...]:
    """A contender's seeds: as many as asked for, in place of its own."""
    try:
        listed = _SEEDS.validate_python(given, strict=True)
    except ValidationError as error:
        raise UserError(f"contender '{label}': seeds={given!r}: {_SEEDS_ARE}") from error
    seeds = list(range(listed)) if isinstance(listed, int) else listed
    if len(set(seeds)) < len(seeds):
        raise UserError(f"contender '{label}': seeds={seeds}: a seed stands twice; expected each once")
    return tuple(seeds if count is None else [*seeds, *range(max(seeds) + 1, max(seeds) + 1 + count)][:count])


def _laid(*given: Mapping[str, Json]) -> Settings:
    """Settings one over the other, each under its known name, and none that is the study's own business."""
    laid: Settings = {}
    for settings in given:
        for key, why in _OURS.items():
            if key in settings:
                raise UserError(f"{key} is no setting of a contender: {why}")
        laid = lay_over(laid, known_names(settings))
    return laid


def _other(name: Json, key: str, label: str, file: StudyFile) -> str:
    """Another contender that one names."""
    if name is None:
        return ""
    if name == label or not isinstance(name, str) or name not in file.contenders:
        others = [other for other in file.contenders if other != label]
        near = f"; {did_you_mean(str(name), others)}" if others else ""
        raise UserError(f"contender '{label}': {key}: there is no other contender '{name}'{near}")
    return name


def _name(label: str, task: str) -> str:
    return f"{label} on {task}" if task else label
