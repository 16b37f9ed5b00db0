"""Chains of small blocks, for the tests of containers."""

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

WIDTH, TOKENS = 16, 5


def tokens(n: int = 3) -> Tensor:
    return torch.randn(n, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def transformer(depth: int = 4, **kwargs: float) -> list[nn.Module]:
    """timm's blocks, as after some training: no branch is small."""
    torch.manual_seed(0)
    blocks = [Block(WIDTH, 2, mlp_ratio=2.0, qkv_bias=True, **kwargs).double() for _ in range(depth)]
    for p in nn.ModuleList(blocks).parameters():
        p.data.add_(torch.randn_like(p), alpha=0.1)
    return list(blocks)


class Biased(nn.Module):
    """A block that takes a bias, positions as a pair, and a flag beside its stream."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)

    def forward(
        self, x: Tensor, bias: Tensor, rope: tuple[Tensor, Tensor] | None = None, negate: bool = False
    ) -> Tensor:
        y = torch.tanh(self.linear(x) + bias)
        if rope is not None:
            sin, cos = rope
            y = y * cos + y.flip(-1) * sin
        return x - y if negate else x + y
