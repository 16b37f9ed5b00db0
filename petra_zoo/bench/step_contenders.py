"""Networks for one training step through a run of residual blocks: ours beside torch's and other libraries'.

F is the branch of timm's BasicBlock on C channels: conv3x3 - BN - ReLU - conv3x3 - BN. Two families:

    streams   [B, 2C, H, W], the streams (a, b) side by side; each block (a, b) -> (b, a + F(b)): this project's with
              coupling 1 and act = identity, as in the networks of the PETRA paper, and what other libraries compute
    layer     [B, C, H, W]; a ResNet layer as users meet it: timm's own blocks against the zoo's `CoupledLayer`

Within a family all contenders have the same weights and the same input. All streams compute the same function, and so
do all layers of ours; timm's layer, whose blocks have no stream a to add, does the same work but for that sum.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable

import torch
from timm.models.resnet import BasicBlock
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from petra_zoo.bench.steps import FAMILY, StepShape
from petra_zoo.models import CoupledLayer
from petra_zoo.models.memory_modes import Memory
from petra_zoo.reversible import CoupledUnit, backpropagate

SEED = 0
Builder = Callable[[int, int], nn.Module]  # (blocks, channels)


class Branch(nn.Sequential):
    """F of block `index`. Other libraries register and rename branches as they like; the index finds them again."""

    def __init__(self, index: int, channels: int) -> None:
        super().__init__(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )
        self.index = index


def build_branches(blocks: int, channels: int) -> list[Branch]:
    """The same branches at every call; the caller's generator state neither matters nor changes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return [Branch(index, channels) for index in range(blocks)]


class _Block(nn.Module):
    def __init__(self, branch: Branch) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return b, a + self.branch(b)


class _Stack(nn.Module):
    """Blocks in a row, with stored activations or with torch's checkpointing of every single block."""

    def __init__(self, branches: list[Branch], *, checkpointed: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Block(branch) for branch in branches)
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=1)
        for block in self.blocks:
            # A checkpoint keeps one new tensor per block: the new a is the old b.
            a, b = checkpoint(block, a, b, use_reentrant=False) if self.checkpointed else block(a, b)
        return torch.cat((a, b), dim=1)


class _OurStack(nn.Module):
    """The same blocks through `petra_zoo.reversible`."""

    def __init__(self, branches: list[Branch]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.units = [
            CoupledUnit(str(i), f, branch=f, activate=lambda b: b, coupling=lambda: 1.0) for i, f in enumerate(branches)
        ]

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=1)
        b, a = backpropagate(self.units, (b, a))
        return torch.cat((a, b), dim=1)


def _memcnn(blocks: int, channels: int) -> nn.Module:
    """memcnn's additive coupling holds two branches, y1 = x1 + F(x2), y2 = x2 + G(y1): two blocks. Even depths only."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # it still imports torch.cuda.amp.custom_fwd
        memcnn = importlib.import_module("memcnn")
    branches = build_branches(blocks, channels)
    return nn.Sequential(
        *(
            # It empties the storage of what it is given, unless told to keep it: the first input is the caller's.
            memcnn.InvertibleModuleWrapper(memcnn.AdditiveCoupling(Fm=f, Gm=g), keep_input=f.index == 0)
            for f, g in zip(branches[::2], branches[1::2], strict=True)
        )
    )


def _revlib(blocks: int, channels: int) -> nn.Module:
    """revlib's sequence in its default memory mode, an autograd function that reconstructs; one module is one block."""
    return importlib.import_module("revlib").ReversibleSequential(*build_branches(blocks, channels))


def _timm_layer(blocks: int, channels: int) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return nn.Sequential(*(BasicBlock(channels, channels) for _ in range(blocks)))


def _our_layer(memory: Memory) -> Builder:
    def build(blocks: int, channels: int) -> nn.Module:
        layer = CoupledLayer(*_timm_layer(blocks, channels), behind_stem=True)
        layer.memory = memory
        return layer

    return build


BUILDERS: dict[str, Builder] = {
    "plain": lambda n, c: _Stack(build_branches(n, c), checkpointed=False),
    "torch.utils.checkpoint per block": lambda n, c: _Stack(build_branches(n, c), checkpointed=True),
    "memcnn": _memcnn,
    "revlib": _revlib,
    "petra-zoo": lambda n, c: _OurStack(build_branches(n, c)),
    "timm": _timm_layer,
    "petra-zoo plain": _our_layer("plain"),
    "petra-zoo recompute": _our_layer("recompute"),
    "petra-zoo reversible": _our_layer("reversible"),
}


def build_contender(name: str, shape: StepShape) -> tuple[nn.Module, Tensor]:
    """A contender and its input: standard normal streams, or what comes out of an activation."""
    model = BUILDERS[name](shape.blocks, shape.channels)
    width = 2 * shape.channels if FAMILY[name] == "streams" else shape.channels
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(shape.batch_size, width, shape.img_size, shape.img_size, generator=generator)
    return model, x.relu() if FAMILY[name] == "layer" else x
