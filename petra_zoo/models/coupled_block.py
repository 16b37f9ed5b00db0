"""Residual blocks of timm's ResNet as coupled blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Optional, TypeGuard

import torch
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn

from petra_zoo.errors import UserError
from petra_zoo.reversible import FLOAT_STREAMS, BranchBlock, Coupling, StreamType, advance, coupled
from petra_zoo.reversible.stream_type import scripted_snap, scripted_sum, to_carrier, widened


class CoupledBlock(BranchBlock):
    """What timm's residual blocks need to be coupled blocks: the parts of their forward, put together anew.

    Called with an activation alone it is timm's block. In a run with a coupling it gives the sum *before* the
    activation behind it, the stream b'.
    """

    if TYPE_CHECKING:  # timm's, with the names of its ResNet
        conv1: nn.Conv2d
        downsample: nn.Module | None

    def branch(self, x: Tensor) -> Tensor:
        """F(h): everything before the addition. Holds its argument no longer than its first layer reads it."""
        raise NotImplementedError

    def activate(self, b: Tensor) -> Tensor:
        """The activation behind the block."""
        raise NotImplementedError

    @torch.jit.unused
    def rectifies(self) -> bool:
        """Whether the activation behind the block is relu, with nobody listening, and nobody's other one before it."""
        if type(self).activate not in _ACTIVATE or not vars(self).keys().isdisjoint(("activate", "last_activation")):
            return False
        act = self.last_activation()
        return (
            type(act) is nn.ReLU and "forward" not in vars(act) and not (act._forward_hooks or act._forward_pre_hooks)
        )

    @torch.jit.unused
    def last_activation(self) -> nn.Module:
        """The module of the activation behind the block."""
        raise NotImplementedError

    def __setattr__(self, name: str, value: Tensor | nn.Module) -> None:
        if name == LAST_ACTIVATION.get(type(self)) and "inplace" in vars(value):
            vars(value)["inplace"] = False  # its argument lives on as a stream
        super().__setattr__(name, value)

    @torch.jit.unused
    def coupled_step(
        self, x: Tensor, a: Tensor | None = None, g: Coupling = 0.0, streams: StreamType = FLOAT_STREAMS
    ) -> Tensor:
        """The stream b' from the activation x: the formula, with a down-sampling block's projection as its shortcut."""
        h = streams.for_branch(x, self)
        project = self.downsample
        shortcut = streams.shortcut(x, self) if project is None else streams.carry(project(h))
        return coupled(shortcut, self.run_branch(h), a, g, streams)

    @torch.jit.unused
    def forward(
        self, x: Tensor, a: Tensor | None = None, g: Coupling = 0.0, streams: StreamType = FLOAT_STREAMS
    ) -> Tensor:
        """The block's output as a stream.

        Args:
            x: the activation h [B, C, H, W].
            a: inside a run behind its first block, the stream a.
            g: the coupling of the block's run. At 0 the output is the activation that timm's block gives; above, b'.
            streams: the type of the run's streams.
        """
        b = self.coupled_step(x, a, g, streams)
        return self.activate(b) if is_zero(g) else b

    def scripted(self, x: Tensor, a: Optional[Tensor], g: Coupling, kind: str, grid: float) -> Tensor:  # noqa: UP045
        """TorchScript's own copy of `forward`: it has no `StreamType`, no checks, and no weights behind a wrapper."""
        h = x.to(self.conv1.weight.dtype)
        shortcut = h if kind == "fixed16" else to_carrier(x, kind)
        if self.downsample is not None:
            shortcut = to_carrier(self.downsample(h), kind)
        if kind == "fixed16":
            shortcut = widened(shortcut)
        b = scripted_snap(advance(shortcut, self.branch(h), 0.0 if a is None else g), kind, grid)
        if a is not None:
            b = scripted_sum(b, a, g, kind, grid)
        return self.activate(b) if g == 0.0 else b


class CoupledBasicBlock(CoupledBlock, BasicBlock):
    """timm's BasicBlock as a coupled block."""

    def branch(self, x: Tensor) -> Tensor:
        x = self.act1(self.drop_block(self.bn1(self.conv1(x))))
        if self.aa is not None:
            x = self.aa(x)
        x = self.bn2(self.conv2(x))
        if self.se is not None:
            x = self.se(x)
        if self.drop_path is not None:
            x = self.drop_path(x)
        return x

    def activate(self, b: Tensor) -> Tensor:
        return self.act2(b)

    @torch.jit.unused
    def last_activation(self) -> nn.Module:
        return self.act2


class CoupledBottleneck(CoupledBlock, Bottleneck):
    """timm's Bottleneck as a coupled block."""

    def branch(self, x: Tensor) -> Tensor:
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.act2(self.drop_block(self.bn2(self.conv2(x))))
        if self.aa is not None:
            x = self.aa(x)
        x = self.bn3(self.conv3(x))
        if self.se is not None:
            x = self.se(x)
        if self.drop_path is not None:
            x = self.drop_path(x)
        return x

    def activate(self, b: Tensor) -> Tensor:
        return self.act3(b)

    @torch.jit.unused
    def last_activation(self) -> nn.Module:
        return self.act3


LAST_ACTIVATION: dict[type[nn.Module], str] = {CoupledBasicBlock: "act2", CoupledBottleneck: "act3"}
_ACTIVATE = (CoupledBasicBlock.activate, CoupledBottleneck.activate)


def is_zero(g: Coupling) -> bool:
    """Whether g is 0 for certain: a coupling that cannot be read may be anything."""
    return not isinstance(g, Tensor) and g == 0.0


def is_coupled(block: nn.Module) -> TypeGuard[CoupledBlock]:
    """Whether a module is a coupled block, or somebody's wrapper around one, which has its methods too."""
    return hasattr(block, "coupled_step")


COUPLED_BLOCKS: dict[type[nn.Module], type[CoupledBlock]] = {
    BasicBlock: CoupledBasicBlock,
    Bottleneck: CoupledBottleneck,
}


def couple_block(block: nn.Module) -> CoupledBlock:
    """Turns timm's BasicBlock or Bottleneck into its coupled form, in place; parameters and names stay.

    Raises:
        UserError: the block is of another class, or its activation has parameters.
    """
    coupled = COUPLED_BLOCKS.get(type(block))
    if coupled is None:
        raise UserError(
            f"{type(block).__name__} has no coupled form: only timm's BasicBlock and Bottleneck, exactly, do "
            "(resnet, resnext, wide_resnet, seresnet, ecaresnet and their stems)"
        )
    block.__class__ = coupled
    assert isinstance(block, CoupledBlock)
    check_activation(block, type(block).__name__)
    name = LAST_ACTIVATION[coupled]
    setattr(block, name, block.get_submodule(name))  # which may write into its argument no longer
    return block


def check_activation(block: CoupledBlock, name: str) -> None:
    """Refuses an activation behind a block whose parameters would be part of two units, the block's and the next one.

    Raises:
        UserError: it has parameters.
    """
    act = block.last_activation()
    if next(act.parameters(), None) is not None:
        raise UserError(
            f"{name}: an activation with parameters ({type(act).__name__}) behind a block has no coupled form: "
            "use relu or silu, or train with set_memory('plain')"
        )
