"""What there is to say about a network before it is trained."""

from __future__ import annotations

import copy
import difflib
import inspect
from dataclasses import asdict, dataclass
from functools import cache

import timm
import torch
from timm.models import get_arch_pretrained_cfgs, get_model_input_config, model_entrypoint
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from petra_zoo.errors import UserError
from petra_zoo.models.classifier import UnitClassifier, as_unit_classifier, config_of
from petra_zoo.models.petra_revnet import PetraRevNet
from petra_zoo.models.resnet_weights import choose_couplings
from petra_zoo.models.transformer import ReversibleTransformer
from petra_zoo.models.transformer_weights import couple_as_loaded
from petra_zoo.models.unfilled import Unfilled
from petra_zoo.reversible import CoupledUnit, segments, units_of
from petra_zoo.strict_json import JsonObject


@dataclass(frozen=True)
class Description:
    """Facts about a registered network, computed on the meta device.

    Attributes:
        macs: multiply-adds of a forward, per image.
        runs: lengths of the runs of reversible blocks.
        coupling: g of each reversible block's layer, as initialised.
    """

    name: str
    summary: str
    parameters: int
    macs: float
    input_size: tuple[int, int, int]
    num_classes: int
    units: int
    reversible_units: int
    runs: list[int]
    coupling: list[float]

    def as_dict(self) -> JsonObject:
        """For JSON."""
        return asdict(self)


def zoo_names(pattern: str = "*") -> list[str]:
    """Registered networks whose names match: ours, and those with units that others have registered."""
    return [name for name in timm.list_models(pattern) if _is_of_the_zoo(name)]


def _is_of_the_zoo(name: str) -> bool:
    if name == "petra_any":  # none by itself, but any that is its source
        return False
    room = model_entrypoint(name).__module__.split(".")[0]
    return room == "petra_zoo" or (room != "timm" and _has_units(name))


@cache
def _has_units(name: str) -> bool:
    try:
        units_of(_on_meta(name))
    except Exception:  # it is somebody's own, and may fail in any way
        return False
    return True


def _on_meta(name: str) -> nn.Module:
    with Unfilled():
        try:
            return timm.create_model(name, device="meta")
        except TypeError:  # its constructor takes no device
            with torch.device("meta"):
                return timm.create_model(name)


def nearest_models(name: str, known: list[str]) -> str:
    """For messages: up to three of the known names, where they look like this one, and where all are listed."""
    near = difflib.get_close_matches(name.partition(".")[0], known, n=3)
    return f"nearest: {', '.join(near)} (petra-zoo list shows all)" if near else "petra-zoo list shows all"


def model_names(pattern: str = "*") -> list[str]:
    """Registered networks of the zoo whose names match, with or without the prefix petra_.

    Raises:
        UserError: none does.
    """
    names = zoo_names(pattern) or zoo_names(f"petra_*{pattern}")
    if not names:
        raise UserError(f"no model matches {pattern!r}; petra-zoo list shows all, wildcards are * and ?")
    return names


def describe_registered(name: str) -> Description:
    """Looks a network up, or one of its tags (ARCHITECTURE.TAG): then as it is once those weights are loaded.

    Raises:
        UserError: no such network or tag; names the nearest.
    """
    return describe_model(create_meta(name), name)


def create_meta(name: str) -> UnitClassifier:
    """A network with units on the meta device, without content, in eval mode: some have units in no other.

    Raises:
        UserError: no such network or tag, names the nearest; or it has no units.
    """
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        raise UserError(f"model {name!r} is unknown; {nearest_models(name, zoo_names())}")
    tags = get_arch_pretrained_cfgs(architecture)
    if tag and name not in tags:
        raise UserError(f"{architecture} has no tag {tag!r}; it has: {', '.join(key.split('.', 1)[1] for key in tags)}")
    model = _on_meta(name).eval()
    # A plain network's weights are coupled while they load.
    if tag and isinstance(model, ReversibleTransformer):
        couple_as_loaded(model)
    elif tag and isinstance(model, PetraRevNet) and str(config_of(model).get("hf_hub_id")).startswith("timm/"):
        chosen = choose_couplings(model.named_layers())
        model = timm.create_model(name, device="meta", coupling=chosen.couplings, anchor_every=chosen.anchors)
    return as_unit_classifier(model.eval())


def summary_of(name: str) -> str:
    """The first line that a registered network's documentation has, or a tag's of it."""
    return (inspect.getdoc(model_entrypoint(name.partition(".")[0])) or "").split("\n")[0]


def describe_model(model: UnitClassifier, name: str) -> Description:
    """The same facts about a model at hand, made by `timm.create_model` as `name`; it is left as it is."""
    channels, height, width = get_model_input_config(model)["input_size"]
    meta = copy.deepcopy(model).to("meta").eval().requires_grad_(False)  # the counter would look for graphs
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        meta(torch.empty(1, channels, height, width, device="meta"))
    units = units_of(model)
    runs = [segment for segment in segments(units) if segment[0].reversible]
    return Description(
        name=name,
        summary=summary_of(name),
        parameters=sum(p.numel() for p in model.parameters()),
        macs=counter.get_total_flops() / 2,
        input_size=(channels, height, width),
        num_classes=model.num_classes,
        units=len(units),
        reversible_units=sum(len(run) for run in runs),
        runs=[len(run) for run in runs],
        coupling=[run[0].coupling() for run in runs if isinstance(run[0], CoupledUnit)],
    )
