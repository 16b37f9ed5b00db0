"""Under which name and with which arguments timm rebuilds a converted network.

Every timm ResNet is a `petra_revnet` with the constructor arguments that timm's entry point gives it. timm records only
what the caller added, so the entry point is run once more with a recording stand-in for the function that builds.
"""

from __future__ import annotations

from types import FunctionType

from timm.models import is_model, model_entrypoint
from timm.models.resnet import BasicBlock, Bottleneck

from petra_zoo.converters.identity import give_identity
from petra_zoo.models import PetraRevNet
from petra_zoo.models.classifier import config_of
from petra_zoo.models.layer_arguments import Arguments, to_words

_NAMES = {
    (BasicBlock, (2, 2, 2, 2)): "petra_revnet18",
    (BasicBlock, (3, 4, 6, 3)): "petra_revnet34",
    (Bottleneck, (3, 4, 6, 3)): "petra_revnet50",
    (Bottleneck, (3, 4, 23, 3)): "petra_revnet101",
    (Bottleneck, (3, 8, 36, 3)): "petra_revnet152",
}
_OTHER_DEPTHS = {BasicBlock: "petra_revnet18", Bottleneck: "petra_revnet50"}


def constructor_arguments(architecture: str) -> Arguments | None:
    """The arguments, `block` and `layers` included, that timm's entry point gives to `ResNet`; None where unknown."""
    if not is_model(architecture):
        return None
    entry = model_entrypoint(architecture)
    if "_create_resnet" not in entry.__code__.co_names:
        return None
    stand_in = {**entry.__globals__, "_create_resnet": lambda variant, pretrained=False, **kwargs: kwargs}
    record = FunctionType(entry.__code__, stand_in, entry.__name__, entry.__defaults__, entry.__closure__)
    return record()


def take_identity(model: PetraRevNet, added: Arguments) -> None:
    """Gives a converted network the name and the arguments under which `timm.create_model` rebuilds it.

    Preprocessing stays the source's. Does nothing where the source was not made by timm, is one of its pruned
    networks, or was made with arguments that cannot be written down (JSON): such a network
    works, but cannot be saved for timm.

    Args:
        model: made by `PetraRevNet.from_resnet`, with the source's `pretrained_cfg`.
        added: arguments of the reversible network that the source does not have.
    """
    config = config_of(model)
    arguments = constructor_arguments(config.get("architecture", ""))
    if arguments is None or arguments.get("pruned"):  # timm prunes by a file that bears the architecture's name
        return
    arguments = to_words({**arguments, **getattr(model, "_model_args", {})})
    block, layers = arguments["block"], tuple(arguments["layers"])
    if isinstance(block, list):  # one per layer: it stays among the arguments
        block = BasicBlock
    else:
        del arguments["block"]
    name = _NAMES.get((block, layers))
    if name is not None:
        del arguments["layers"]
    anchors = [layer.anchor_every for layer in model.coupled_layers()]
    if any(anchors):
        arguments["anchor_every"] = anchors
    give_identity(model, name or _OTHER_DEPTHS[block], {**arguments, **added})
