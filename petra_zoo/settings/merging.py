"""Settings that are laid over others: a recipe over the one it extends, KEY=VALUE from the command line over both."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence

import yaml

from petra_zoo.errors import UserError
from petra_zoo.settings.recipe import Recipe
from petra_zoo.settings.yaml12 import read_yaml
from petra_zoo.strict_json import Json

Settings = dict[str, Json]

# Two ways to say one thing: whoever says one of them takes back the other.
_INSTEAD_OF = {"lr": "lr_base", "lr_base": "lr"}
# Likewise, but null takes nothing back; and those that choose together take back what they choose.
_OTHER_WORD = {
    "update_size": "batch_size",
    "batch_size": "update_size",
    "epochs": "max_updates",
    "max_updates": "epochs",
}
_CHOOSING, _CHOSEN = {"update_size", "max_delay"}, {"batch_size", "accumulation_steps"}
_ALIASES = {"grad_accum_steps": "accumulation_steps"}


def lay_over(below: Mapping[str, Json], above: Mapping[str, Json]) -> Settings:
    """The settings below, with those above in their place. A mapping or a list is one value and replaced as a whole.

    What above says in another way is taken back below: `lr` and `lr_base`, `batch_size` and `update_size`, `epochs` and
    `max_updates`; and `update_size` and `max_delay`, once both stand, choose `batch_size` and `accumulation_steps`:
    whoever says one of these does without a `max_delay` that chose it.
    """
    said = {key for key, value in above.items() if value is not None}
    under = {key for key, value in below.items() if value is not None}
    replaced = {_OTHER_WORD[key] for key in said & _OTHER_WORD.keys()}
    if said & _CHOSEN and under >= _CHOOSING:
        replaced |= {"max_delay"}
    if said & _CHOOSING and said | (under - replaced) >= _CHOOSING:
        replaced |= _CHOSEN
    return _in_place({key: value for key, value in below.items() if key not in replaced}, above)


def _in_place(below: Mapping[str, Json], above: Mapping[str, Json]) -> Settings:
    replaced = {_INSTEAD_OF.get(key) for key in above}
    return {key: value for key, value in below.items() if key not in replaced} | dict(above)


_OPTIONS = ("allow_change", "max_restarts", "max_time", "nproc", "resume")  # of `train`


def override(settings: Mapping[str, Json], overrides: Sequence[str]) -> Settings:
    """Settings with overrides laid over them, all at once; of two of the same setting, the later one.

    Args:
        settings: with known names.
        overrides: `KEY=VALUE` each, the value in YAML.

    Raises:
        UserError: one is not of that form, or of an unknown setting.
    """
    if isinstance(overrides, str):
        raise UserError(f"overrides are a list of KEY=VALUE, such as ['lr=0.1'], not the text {overrides!r}")
    said: Settings = {}
    for text in overrides:
        key, value = _parse(text)
        if key in _OPTIONS:
            raise UserError(f"{text}: that is an option, and no setting: --{key.replace('_', '-')} {value}")
        if key == "extends":  # it is no setting, and what is nearest to it would be no help
            raise UserError(f"{text}: only a recipe's file extends another: write one, or train by {value} itself")
        said = _in_place(said, known_names({key: value}))
    return lay_over(settings, said)


def known_names(settings: Mapping[str, Json]) -> Settings:
    """The settings under our names. Before anything is merged, so that an alias replaces what our own name says.

    Raises:
        UserError: a setting is unknown, gives the nearest; or it is given under both of its names.
    """
    for alias, name in _ALIASES.items():
        if alias in settings and name in settings:  # else whichever stands last would win
            raise UserError(f"{alias} and {name} are two names of one setting: give one of them")
    known = {_ALIASES.get(key, key): value for key, value in settings.items()}
    for key in known:
        if key not in Recipe.model_fields:
            known_ones = "petra-zoo recipes settings lists all"
            raise UserError(f"unknown setting '{key}'; {did_you_mean(str(key), Recipe.model_fields, known_ones)}")
    return known


def did_you_mean(name: str, names: Iterable[str], otherwise: str | None = None) -> str:
    """For messages: the name that looks like it; where none does, `otherwise`, or all there are."""
    known = list(names)
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean '{near[0]}'?" if near else otherwise or f"expected one of {', '.join(known)}"


def in_one_line(error: Exception) -> str:
    """An error's words without its line breaks."""
    return " ".join(str(error).split())


def _parse(override: str) -> tuple[str, Json]:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"override '{override}' is not KEY=VALUE, such as lr=0.1")
    try:
        return key.strip(), read_yaml(text)
    except yaml.YAMLError as error:
        raise UserError(f"override '{override}': the value is not valid YAML: {in_one_line(error)}") from error
