"""Reversible twins of timm's networks: every name of one of its families, with ``petra_`` in front.

timm says what a network is made of in the function that it registers under the network's name: `vit_tiny_patch16_224`
fixes widths and depths and hands them to `_create_vision_transformer`, which knows how published weights are read and
calls timm's `build_model_with_cfg` with a class. A twin runs copies of these very functions in which that last call
takes our class, so that sizes, filters of weights and options are timm's, in this version of timm and in the next.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import FunctionType, ModuleType

import timm
from timm.models import (
    PretrainedCfg,
    build_model_with_cfg,
    generate_default_cfgs,
    get_arch_pretrained_cfgs,
    register_model,
)
from timm.models import model_entrypoint as entry_of
from torch import Tensor, nn

from petra_zoo.errors import UserError
from petra_zoo.models.layer_arguments import Argument, Arguments

PREFIX = "petra_"
Weights = dict[str, Tensor]
Filter = Callable[[Weights, nn.Module], Weights]


@dataclass(frozen=True)
class Family:
    """Networks that timm builds in one of its modules.

    Attributes:
        source: the module.
        builder: its function that all of its networks are built by.
        classes: ours in place of timm's.
        couple: what becomes of weights that timm's own filter has read.
    """

    source: ModuleType
    builder: str
    classes: Mapping[type[nn.Module], type[nn.Module]]
    couple: Filter

    def names(self) -> list[str]:
        """timm's names of them."""
        return timm.list_models(module=self.source.__name__.rpartition(".")[2])


def twin_cfgs(name: str, source: str) -> dict[str, PretrainedCfg]:
    """All tags of a timm network's weights for the reversible network of the same parameters, the default first.

    Preprocessing, licence and origin are timm's; the weights are timm's own files, on the Hub where they are there.

    Args:
        name: of the reversible network.
        source: of timm's.
    """
    cfgs = get_arch_pretrained_cfgs(source)
    return {
        key.replace(source, name, 1): replace(cfg, url=None if cfg.hf_hub_id else cfg.url, architecture=None, tag=None)
        for key, cfg in cfgs.items()
    }


def register_twins(home: str, family: Family) -> None:
    """Registers the reversible twin of every network of a family, with all tags of its weights.

    Args:
        home: the module that they shall be of, which so gets its ``default_cfgs``.
        family: theirs.
    """
    names = family.names()
    cfgs = [twin_cfgs(PREFIX + name, name) for name in names]
    known = vars(sys.modules[home]).setdefault("default_cfgs", {})
    known.update(generate_default_cfgs({key: cfg for of in cfgs for key, cfg in of.items()}))
    for name in names:
        register_model(_twin(home, family, name))


def _twin(home: str, family: Family, name: str) -> Callable[..., nn.Module]:
    """What makes a network of this name: looked for in timm when it is called, which is long after its import."""

    def create(pretrained: bool = False, **kwargs: Argument) -> nn.Module:
        return _create(family, name, pretrained, kwargs)

    create.__name__ = create.__qualname__ = PREFIX + name
    create.__module__ = home
    lines = (inspect.getdoc(entry_of(name)) or "").splitlines()
    create.__doc__ = f"Reversible {name}: {lines[0].strip()}" if lines else f"Reversible {name}"
    return create


def _create(family: Family, name: str, pretrained: bool, kwargs: Arguments) -> nn.Module:
    builder = vars(family.source)[family.builder]
    build = rebound(builder, build_model_with_cfg=partial(_build, family))
    model = rebound(entry_of(name), **{family.builder: build})(pretrained=pretrained, **kwargs)
    network = getattr(model, "model", model)  # features_only=True wraps it
    if not isinstance(network, tuple(family.classes.values())):
        raise UserError(
            f"{PREFIX}{name} became timm's {type(network).__name__}, which is not reversible: leave use_naflex out, "
            "and unset TIMM_USE_NAFLEXVIT"
        )
    return model


def _build(
    family: Family,
    source: type[nn.Module],
    variant: str,
    pretrained: bool,
    *,
    pretrained_filter_fn: Filter,
    **kwargs: Argument,
) -> nn.Module:
    """timm's `build_model_with_cfg`, as its builders call it, for our class."""

    def read_and_couple(weights: Weights, model: nn.Module) -> Weights:
        return family.couple(pretrained_filter_fn(weights, model), model)

    return build_model_with_cfg(
        family.classes[source], PREFIX + variant, pretrained, pretrained_filter_fn=read_and_couple, **kwargs
    )


def rebound(function: Callable[..., Argument], **names: Argument) -> Callable[..., Argument]:
    """A copy of a function that finds other objects under some global names; the function stays as it is.

    Args:
        function: a plain one.
        names: what it shall find.
    """
    assert isinstance(function, FunctionType)
    copy = FunctionType(
        function.__code__,
        {**function.__globals__, **names},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
