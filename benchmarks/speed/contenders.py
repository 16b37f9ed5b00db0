"""Outside contenders for the cost of one training step through a run of reversible blocks.

Every builder has the signature `build(depth, channels) -> nn.Module`, draws the same weights from the same seed, and
computes the same function, so that times and memory compare like with like and gradients can be compared, too:

    input and output  [B, 2C, H, W]: the streams (a, b) side by side in the channel dimension
    each block        (a, b) -> (b, a + F(b)),  F = conv3x3 - BN - ReLU - conv3x3 - BN on C channels

F is the branch of timm's BasicBlock, and the block is this project's with coupling 1 and act = identity, as in the
networks of the PETRA paper.

memcnn and revlib are needed here only: `pip install --no-deps -r benchmarks/reversible_step/requirements.txt`
(memcnn also asks for SimpleITK and more, for experiments of its own). Running this file checks every contender against
plain backpropagation.
"""

import argparse
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

SEED = 0
Builder = Callable[[int, int], nn.Module]


class Branch(nn.Sequential):
    """F of block `index`. The libraries register and rename branches as they like; the index finds them again."""

    def __init__(self, index: int, channels: int) -> None:
        super().__init__(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )
        self.index = index


def build_branches(depth: int, channels: int) -> list[Branch]:
    """The same branches at every call; the caller's generator state neither matters nor changes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return [Branch(index, channels) for index in range(depth)]


def branches_of(model: nn.Module) -> list[Branch]:
    return sorted((m for m in model.modules() if isinstance(m, Branch)), key=lambda branch: branch.index)


class Block(nn.Module):
    def __init__(self, branch: Branch) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return b, a + self.branch(b)


class Stack(nn.Module):
    """The blocks in a row, with stored activations or with torch's checkpointing of every single block."""

    def __init__(self, branches: list[Branch], *, checkpointed: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(branch) for branch in branches)
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=1)
        for block in self.blocks:
            a, b = checkpoint(block, a, b, use_reentrant=False) if self.checkpointed else block(a, b)
        return torch.cat((a, b), dim=1)


def build_plain(depth: int, channels: int) -> nn.Module:
    """Ordinary backpropagation with stored activations: the reference."""
    return Stack(build_branches(depth, channels), checkpointed=False)


def build_checkpoint(depth: int, channels: int) -> nn.Module:
    """Every block keeps its input, which is one new tensor per block because the new a is the old b."""
    return Stack(build_branches(depth, channels), checkpointed=True)


def build_memcnn(depth: int, channels: int) -> nn.Module:
    """memcnn's additive coupling holds two branches, y1 = x1 + F(x2), y2 = x2 + G(y1): two blocks. Even depths only."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # it still imports torch.cuda.amp.custom_fwd
        import memcnn

    if depth % 2:
        raise ValueError(f"memcnn couples blocks in pairs: the depth must be even, not {depth}")
    branches = build_branches(depth, channels)
    return nn.Sequential(
        *(
            # It empties the storage of what it is given, unless told to keep it: the first input is the caller's.
            memcnn.InvertibleModuleWrapper(memcnn.AdditiveCoupling(Fm=f, Gm=g), keep_input=f.index == 0)
            for f, g in zip(branches[::2], branches[1::2], strict=True)
        )
    )


def build_revlib(depth: int, channels: int) -> nn.Module:
    """revlib's sequence in its default memory mode, an autograd function that reconstructs; one module is one block."""
    import revlib

    return revlib.ReversibleSequential(*build_branches(depth, channels))


CONTENDERS: dict[str, Builder] = {
    "plain": build_plain,
    "checkpoint": build_checkpoint,
    "memcnn": build_memcnn,
    "revlib": build_revlib,
}


def step(model: nn.Module, streams: Tensor) -> Tensor:
    """Forward, loss and backward; returns the loss."""
    # The reversible libraries' functions need an input with a gradient, as it comes from a stem.
    loss = model(streams.detach().requires_grad_()).square().mean()
    loss.backward()
    return loss.detach()


def gradients_of(model: nn.Module) -> list[Tensor]:
    """The gradients of all parameters in the order of the blocks; None for one of them is an error."""
    named = [(f"block {b.index} {name}", p.grad) for b in branches_of(model) for name, p in b.named_parameters()]
    missing = [name for name, gradient in named if gradient is None]
    if missing:
        raise RuntimeError(f"no gradient for {missing}")
    return [gradient for _, gradient in named if gradient is not None]


def batch_norm_updates(model: nn.Module) -> list[int]:
    """How often each block's first batch norm has updated its running statistics."""
    return [int(branch.get_buffer("1.num_batches_tracked")) for branch in branches_of(model)]


def main() -> None:
    parser = argparse.ArgumentParser(description="Check every contender's gradients against plain backpropagation.")
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--channels", type=int, default=8)
    options = parser.parse_args()
    streams = torch.randn(4, 2 * options.channels, 12, 12, generator=torch.Generator().manual_seed(SEED))
    plain = build_plain(options.depth, options.channels)
    step(plain, streams)
    expected = gradients_of(plain)
    scale = max(float(gradient.abs().max()) for gradient in expected)
    for name, build in CONTENDERS.items():
        model = build(options.depth, options.channels)
        loss = step(model, streams)
        gradients = gradients_of(model)
        error = max(float((g - e).abs().max()) for g, e in zip(gradients, expected, strict=True)) / scale
        finite = all(bool(gradient.isfinite().all()) for gradient in gradients)
        print(
            f"{name:10}  loss {loss:.6f}  {len(gradients)} gradients, {'all finite' if finite else 'NOT FINITE'}, "
            f"largest difference to plain {error:.1e}  batch-norm updates per step {batch_norm_updates(model)}"
        )


if __name__ == "__main__":
    main()
