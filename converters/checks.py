"""Which networks have a reversible form, and whether weights belong to a network."""

from __future__ import annotations

from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn

from petra_zoo.errors import UserError
from petra_zoo.models.classifier import config_of
from petra_zoo.models.memory_modes import MemoryModes
from petra_zoo.models.petra_revnet import LAYERS

_INSTEAD = "use a ResNet of timm's BasicBlock or Bottleneck instead, such as resnet50, seresnet50 or resnext50_32x4d"


def check_source(network: nn.Module) -> ResNet:
    """The same network; refuses what cannot be converted.

    Raises:
        UserError: see `check_blocks`; or a weight or statistic is not finite.
    """
    source = check_blocks(network)
    bad = [name for name, x in network.state_dict().items() if x.is_floating_point() and not x.isfinite().all()]
    if bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise UserError(f"{name_of(network)}: {bad[0]}{more} holds values that are not finite")
    return source


def check_blocks(network: nn.Module) -> ResNet:
    """The same network; refuses what is not residual in the way that has a coupled form; works on the meta device.

    Raises:
        UserError: naming what the network is made of, and what could be used instead.
    """
    name = name_of(network)
    if isinstance(network, MemoryModes):
        raise UserError(f"{name} is reversible already: train it as it is, or convert the ResNet it came from")
    if type(network) is not ResNet:
        raise UserError(f"{name} cannot be converted, it is a {type(network).__name__}: {_INSTEAD}")
    for layer in (getattr(network, layer) for layer in LAYERS):
        if not isinstance(layer, nn.Sequential) or not len(layer):
            raise UserError(f"{name} cannot be converted, some of its layers are missing: {_INSTEAD}")
        for block in layer:
            if type(block) not in (BasicBlock, Bottleneck):
                raise UserError(f"{name} cannot be converted, its blocks are {type(block).__name__}: {_INSTEAD}")
    return network


def name_of(network: nn.Module) -> str:
    """The architecture's name where timm made the network, else its class."""
    return config_of(network).get("architecture") or type(network).__name__


def fit_weights(weights: dict[str, Tensor], network: nn.Module, source: str, architecture: str) -> None:
    """Refuses weights that are not exactly those of a network, its batch norms' counters aside.

    Args:
        weights: a state dict.
        network: may be on the meta device.
        source: where they come from, for the message.
        architecture: the network's name, for the message.

    Raises:
        UserError: names are missing or unexpected, shapes differ, or the network is reversible already.
    """
    expected = network.state_dict()
    missing, extra = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    # Counters that old checkpoints do not have; torch starts them at 0.
    missing = [key for key in missing if not key.endswith(".num_batches_tracked")]
    wrong = [key for key in expected if key in weights and weights[key].shape != expected[key].shape]
    if any(key.endswith((".coupling", ".exponent")) for key in extra):
        raise UserError(f"{source} holds couplings, it is reversible already: convert the ResNet it came from")
    problems = [f"{what} {_some(keys)}" for what, keys in (("missing", missing), ("unexpected", extra)) if keys]
    if wrong:
        key = wrong[0]
        shapes = f"{list(weights[key].shape)} instead of {list(expected[key].shape)}"
        problems.append(f"{key} is {shapes}" + (f" ({len(wrong) - 1} more differ)" if wrong[1:] else ""))
    if problems:
        raise UserError(f"{source} does not fit {architecture}: {'; '.join(problems)}")


def _some(keys: list[str]) -> str:
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return ", ".join(keys[:3]) + more
