"""timm's ResNets of BasicBlocks and Bottlenecks: every layer is a run, batch norms hold the strength of branches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn

from petra_zoo.converters.back_to_resnet import to_resnet
from petra_zoo.converters.families import NetworkFamily, Refusal
from petra_zoo.converters.identity import exact_arguments
from petra_zoo.converters.resnet_identity import take_identity
from petra_zoo.converters.runs import BlockRun, Call
from petra_zoo.models import CoupledLayer, PetraRevNet
from petra_zoo.models.branch_scaling import branch_scales, scale_branches
from petra_zoo.models.petra_revnet import LAYERS
from petra_zoo.reversible import Streams, Unit


class ResNetFamily(NetworkFamily):
    """Reversible ResNets: `PetraRevNet`."""

    name = "resnet"
    instead = "a ResNet of timm's BasicBlock or Bottleneck instead, such as resnet50, seresnet50 or resnext50_32x4d"
    part = "layer"
    exact = False  # statistics that are estimated anew make up for a larger coupling

    def refusal(self, network: nn.Module, example: Tensor) -> Refusal | None:
        if type(network) is not ResNet:
            return Refusal(f"it is a {type(network).__name__}")
        for layer in (getattr(network, name) for name in LAYERS):
            if not isinstance(layer, nn.Sequential) or not len(layer):
                return Refusal("some of its layers are missing")
            for block in layer:
                if type(block) not in (BasicBlock, Bottleneck):
                    return Refusal(f"its blocks are {type(block).__name__}")
        return None

    def couple(self, network: nn.Module, example: Tensor) -> PetraRevNet:
        assert isinstance(network, ResNet)
        return PetraRevNet.from_resnet(network)

    def owns(self, model: nn.Module) -> bool:
        return isinstance(model, PetraRevNet)

    def runs(self, model: nn.Module) -> Sequence[BlockRun]:
        assert isinstance(model, PetraRevNet)
        return [ResNetRun(name, layer) for name, layer in model.named_layers().items()]

    def identify(self, model: nn.Module, exact_bits: int | None) -> None:
        assert isinstance(model, PetraRevNet)
        take_identity(model, exact_arguments(exact_bits))

    def plain(self, model: nn.Module) -> ResNet:
        return to_resnet(model)


class ResNetRun(BlockRun):
    """A layer of a reversible ResNet. What a branch adds is scaled in its last norm, and the architecture stays."""

    container: CoupledLayer

    def __init__(self, name: str, layer: CoupledLayer) -> None:
        super().__init__(name, layer)
        self._unscaled: dict[str, Tensor] = {}

    @property
    def blocks(self) -> int:
        return len(self.container.in_run())

    @property
    def anchor_every(self) -> int:
        return self.container.anchor_every

    @anchor_every.setter
    def anchor_every(self, blocks: int) -> None:
        self.container.anchor_every = blocks

    def couple(self, g: float) -> None:
        layer = self.container
        layer.set_coupling(g)
        layer.take_any_coupling()
        with torch.no_grad():
            for name, weight in self._unscaled.items():
                layer.get_parameter(name).copy_(weight)
        if g > 0.0:
            self._unscaled = {name: layer.get_parameter(name).detach().clone() for name in branch_scales(layer, g)}
            scale_branches(layer, g)

    def units(self, call: Call) -> tuple[list[Unit], Streams]:
        (h,) = call.args
        units, _ = self.container.units("layer", lambda h: h)
        return units, (self.container.enter(h),)
