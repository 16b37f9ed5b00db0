"""Families of networks: all that the converter does not know of a network by itself.

A family says which networks it takes, makes a coupled copy that computes the same (coupling 0), lists its runs, and
knows the way back and the name under which timm builds it. `register_family` plugs one in; packages do so through the
entry points ``petra_zoo.converter_families``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from petra_zoo.converters.calibration import image_shape
from petra_zoo.converters.runs import BlockRun
from petra_zoo.errors import UserError
from petra_zoo.models.classifier import config_of
from petra_zoo.models.memory_modes import MemoryModes
from petra_zoo.models.reversible_sequential import Units
from petra_zoo.models.run_buffers import RunBuffers
from petra_zoo.registry import Registry


class Refusal(NamedTuple):
    """Why a family does not take a network.

    Attributes:
        what: the network is, such as "it is a DenseNet".
        why: that does not do; "" where it goes without saying.
    """

    what: str
    why: str = ""


class NetworkFamily(ABC):
    """Networks that are converted in one way.

    Attributes:
        name: for the registry.
        instead: what to use instead of a network that cannot be converted, for messages.
        part: what holds a run, for messages: "layer".
        closest_anchors: see `petra_zoo.converters.choose.Limits`.
        largest_drift: likewise; where a family has one, a network of which no run is coupled is refused.
        exact: whether runs get an exact inverse where nobody says so.
    """

    name: str
    instead: str
    part: str = "chain"
    closest_anchors: int | None = None
    largest_drift: float | None = None
    exact: bool | Literal["auto"] = "auto"

    @abstractmethod
    def refusal(self, network: nn.Module, example: Tensor) -> Refusal | None:
        """Why the family does not take a network; None: it does. Works on the meta device.

        Args:
            network: any.
            example: an image [1, C, H, W] of a size that it takes.
        """

    @abstractmethod
    def couple(self, network: nn.Module, example: Tensor) -> nn.Module:
        """A copy with coupling 0: it computes what the network computes, to the bit."""

    def use_units(self, model: nn.Module, units: Units) -> None:
        """Has a coupled model's runs made of whole blocks, or of their branches; by default there are only blocks.

        Raises:
            UserError: its blocks are not known by their branches.
        """
        if units == "branch":
            raise UserError(f"{name_of(model)}: units=branch is for transformers, here a unit is a block: leave it out")

    @abstractmethod
    def owns(self, model: nn.Module) -> bool:
        """Whether a model is one that the family couples (or that is built like one)."""

    @abstractmethod
    def runs(self, model: nn.Module) -> Sequence[BlockRun]:
        """The runs of a coupled model in the order in which it calls them."""

    @abstractmethod
    def identify(self, model: nn.Module, exact_bits: int | None) -> None:
        """Gives a coupled model the name and the arguments under which `timm.create_model` rebuilds it.

        Where there are none, its ``architecture`` stays that of its source, and it cannot be saved for timm.

        Args:
            model: coupled; its anchors are final.
            exact_bits: its streams lie on the grid 2**-exact_bits; None: on none.
        """

    @abstractmethod
    def plain(self, model: nn.Module) -> nn.Module:
        """The plain network that a coupled one with coupling 0 computes, in eval mode on the CPU; the way back.

        Raises:
            UserError: there is none.
        """


FAMILIES = Registry[NetworkFamily]("converter family", "petra_zoo.converter_families")


def register_family(family: NetworkFamily) -> NetworkFamily:
    """Has the converter know a family; one that is registered later is asked earlier."""
    FAMILIES.add(family.name, family)
    return family


def family_for(network: nn.Module, images: Tensor | None = None) -> NetworkFamily:
    """The family that converts a network; works on the meta device.

    Args:
        network: any.
        images: [B, C, H, W] that it takes; None: it was made by timm, and says so itself.

    Raises:
        UserError: there is none: says what the network is made of, and what could be used instead.
    """
    name = name_of(network)
    if isinstance(network, MemoryModes) or any(isinstance(module, RunBuffers) for module in network.modules()):
        raise UserError(f"{name} is reversible already: train it as it is, or convert the network it came from")
    why_not = ""
    for family in reversed([*FAMILIES.values()]):
        refused = family.refusal(network, example_for(network, images))
        if refused is None:
            return family
        # The last one asked takes most.
        why_not = f"{refused.what}: use {family.instead}" + (f" ({refused.why})" if refused.why else "")
    raise UserError(f"{name} cannot be converted, {why_not}")


def example_for(network: nn.Module, images: Tensor | None) -> Tensor:
    """One image [1, C, H, W] that a network takes: the first one at hand, or an empty one of its own size."""
    return torch.zeros(1, *image_shape(network)) if images is None else images[:1]


def family_of(model: nn.Module) -> NetworkFamily:
    """The family of a reversible model.

    Raises:
        UserError: it is of none.
    """
    for family in reversed([*FAMILIES.values()]):
        if family.owns(model):
            return family
    raise UserError(f"{name_of(model)} is a {type(model).__name__}, and no network that petra-zoo convert makes")


def runs_of(model: nn.Module) -> Sequence[BlockRun]:
    """The runs of a converted model."""
    return family_of(model).runs(model)


def name_of(network: nn.Module) -> str:
    """The architecture's name where timm made the network, else its class."""
    return config_of(network).get("architecture") or type(network).__name__
