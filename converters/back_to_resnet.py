"""The way back: a reversible ResNet whose couplings are all 0 as the plain timm ResNet that it computes."""

from __future__ import annotations

import timm
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn

from petra_zoo.converters.families import name_of
from petra_zoo.converters.identity import REVERSIBLE_ONLY, check_computes_plain, plain_weights
from petra_zoo.converters.resnet_identity import constructor_arguments
from petra_zoo.errors import UserError
from petra_zoo.models import PetraRevNet
from petra_zoo.models.classifier import as_classifier, config_of
from petra_zoo.models.layer_arguments import Arguments, from_words, to_words

_GIVEN_ANYWAY = {"num_classes", "in_chans", "dtype", "device"}


def to_resnet(model: nn.Module) -> ResNet:
    """The plain ResNet of timm that computes, to the bit, what a reversible one with coupling 0 computes.

    Args:
        model: made by `timm.create_model`; stays as it is.

    Returns:
        A timm ResNet in eval mode on the CPU, with the model's weights and preprocessing.

    Raises:
        UserError: the model is no reversible ResNet, a coupling is above 0, branches are rounded (exact), or timm has
            no such ResNet.
    """
    name = name_of(model)
    if not isinstance(model, PetraRevNet):
        raise UserError(
            f"{name} has no plain ResNet inside, it is a {type(model).__name__}: only petra_revnet* with coupling 0 "
            "(not the paper's networks, whose streams are two halves) computes what a ResNet computes"
        )
    check_computes_plain(model)
    source = _build(name, model)
    source.load_state_dict(plain_weights(model))
    return source.eval()


def _build(name: str, model: PetraRevNet) -> ResNet:
    architecture, arguments = _plain_identity(model)
    source = timm.create_model(
        architecture,
        num_classes=model.num_classes,
        in_chans=model.in_chans,
        dtype=model.coupled_layers()[0].coupling.dtype,
        **arguments,
    )
    assert isinstance(source, ResNet)
    if repr(PetraRevNet.from_resnet(source)) != repr(model):
        raise UserError(f"timm has no plain ResNet like {name}: its stem or its widths are not those of a timm ResNet")
    built = as_classifier(source)
    built.pretrained_cfg = built.default_cfg = {**config_of(model), "architecture": architecture}
    return source


def _plain_identity(model: PetraRevNet) -> tuple[str, Arguments]:
    """timm's name for the network and the arguments it takes besides: of all names, the one that takes fewest."""
    arguments = as_classifier(model)._model_args
    basic = isinstance(model.coupled_layers()[0][0], BasicBlock)
    given = {key: value for key, value in arguments.items() if key not in REVERSIBLE_ONLY | _GIVEN_ANYWAY}
    block = given.pop("block", BasicBlock if basic else Bottleneck)
    wanted = {"layers": [len(layer) for layer in model.coupled_layers()], **given}
    found = {"resnet18" if basic else "resnet50": wanted}
    for name in timm.list_models(module="resnet"):
        own = to_words(constructor_arguments(name) or {"block": None})
        if own.pop("block") == block and own.keys() <= wanted.keys():
            own["layers"] = list(own["layers"])
            found[name] = {key: value for key, value in wanted.items() if key not in own or own[key] != value}
    architecture = min(found, key=lambda name: len(found[name]))
    return architecture, from_words(found[architecture])
