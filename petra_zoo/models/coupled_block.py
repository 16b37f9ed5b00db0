"""Residual blocks of timm's ResNet as coupled blocks."""

from __future__ import annotations

from typing import Any, Optional

import torch
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn

from petra_zoo.errors import UserError
from petra_zoo.reversible import advance, as_stream, as_weights, check_range, couple, snap

# They look at a tensor's type or values: torch.fx must not trace into them.
torch.fx.wrap("as_stream")
torch.fx.wrap("check_range")
torch.fx.wrap("snap")


class CoupledBasicBlock(BasicBlock):
    """timm's BasicBlock as a coupled block.

    Called with an activation alone it is timm's block. In a run with a coupling it gives the sum *before* the
    activation behind it, the stream b'.
    """

    def branch(self, h: Tensor) -> Tensor:
        """F(h): everything before the addition."""
        x = self.act1(self.drop_block(self.bn1(self.conv1(h))))
        if self.aa is not None:
            x = self.aa(x)
        x = self.bn2(self.conv2(x))
        if self.se is not None:
            x = self.se(x)
        if self.drop_path is not None:
            x = self.drop_path(x)
        return x

    def activate(self, b: Tensor) -> Tensor:
        """The activation behind the block."""
        return self.act2(b)

    def coupled_step(self, x: Tensor, g: float = 0.0, grid: float = 0.0) -> Tensor:
        """(1 - g) * shortcut(x) + F(x), as a stream, from the activation x."""
        if torch.jit.is_scripting():
            h = x.to(self.conv1.weight.dtype)  # TorchScript has no weights behind a wrapper
        else:
            h = as_weights(x, self)
        shortcut = x
        if self.downsample is not None:
            shortcut = self.downsample(h)
        step = advance(as_stream(shortcut), self.branch(h), g)
        return snap(step, grid) if grid > 0.0 else step

    def forward(self, x: Tensor, a: Optional[Tensor] = None, g: float = 0.0, grid: float = 0.0) -> Tensor:  # noqa: UP045
        """The block's output as a stream.

        Args:
            x: the activation h [B, C, H, W].
            a: inside a run behind its first block, the stream a (TorchScript: hence Optional).
            g: the coupling of the block's run. At 0 the output is the activation that timm's block gives; above, b'.
            grid: > 0 for exact inversion.
        """
        if a is None:
            b = self.coupled_step(x, 0.0, grid)
        else:
            b = couple(self.coupled_step(x, g, grid), a, g)
            if grid > 0.0 and not torch.jit.is_scripting():
                check_range(b, grid)
        return self.activate(b) if is_zero(g) else b


class CoupledBottleneck(Bottleneck):
    """timm's Bottleneck as a coupled block; see `CoupledBasicBlock`."""

    def branch(self, h: Tensor) -> Tensor:
        """F(h): everything before the addition."""
        x = self.act1(self.bn1(self.conv1(h)))
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
        """The activation behind the block."""
        return self.act3(b)

    coupled_step = CoupledBasicBlock.coupled_step
    forward = CoupledBasicBlock.forward


def is_zero(g: float) -> bool:
    """Whether g is 0 for certain: a coupling that cannot be read may be anything."""
    return not isinstance(g, Tensor) and g == 0.0


CoupledBlock = CoupledBasicBlock | CoupledBottleneck
COUPLED_BLOCKS: dict[type[nn.Module], type[nn.Module]] = {
    BasicBlock: CoupledBasicBlock,
    Bottleneck: CoupledBottleneck,
}


def couple_block(block: nn.Module) -> nn.Module:
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
    act: Any = block.act2 if isinstance(block, BasicBlock) else block.act3
    if next(act.parameters(), None) is not None:
        raise UserError(f"an activation with parameters ({type(act).__name__}) has no coupled form: use relu or silu")
    if hasattr(act, "inplace"):
        act.inplace = False  # its argument lives on as a stream
    return block
