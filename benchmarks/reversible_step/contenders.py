"""Outside contenders for the cost of one training step through a stack of reversible blocks.

Every builder has the signature `build(depth, channels) -> nn.Module`, draws the same weights from the same seed, and
computes the same function, so that step times and memory compare like with like and outputs can be compared, too:

    streams (a, b), input and output [B, 2C, H, W] = a and b side by side in the channel dimension
    each of `depth` blocks:  (a, b) -> (b, a + F(b)),  F = conv3x3 - BN - ReLU - conv3x3 - BN on C channels

F is the branch of timm's BasicBlock. Its input is not passed through an activation: none of the contenders' couplings
has a place for one outside F, and an activation inside F would cost each of them one more stored or recomputed tensor.

`memcnn` and `revlib` are needed only here: `pip install -r benchmarks/reversible_step/requirements.txt`.
`python benchmarks/reversible_step/contenders.py` checks every contender against `plain`.
"""

import argparse
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

SEED = 0
Builder = Callable[[int, int], nn.Module]


def branch(channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(inplace=True),
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels),
    )


def branches(depth: int, channels: int) -> nn.ModuleList:
    """The same `depth` branches at every call, whatever the caller's generator state, which is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return nn.ModuleList(branch(channels) for _ in range(depth))


class Block(nn.Module):
    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return b, a + self.branch(b)


class Stack(nn.Module):
    """The blocks in a row, with stored activations or with `torch.utils.checkpoint` around each block."""

    def __init__(self, branches: nn.ModuleList, *, checkpointed: bool) -> None:
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
    return Stack(branches(depth, channels), checkpointed=False)


def build_checkpoint(depth: int, channels: int) -> nn.Module:
    """One input kept per block (a' is b, so the pair costs one new tensor), the block run again in the backward."""
    return Stack(branches(depth, channels), checkpointed=True)


class MemcnnStack(nn.Module):
    """memcnn's additive coupling holds two branches, y1 = x1 + F(x2), y2 = x2 + G(y1): exactly two of our blocks."""

    def __init__(self, branches: nn.ModuleList) -> None:
        super().__init__()
        import memcnn

        if len(branches) % 2:
            raise ValueError(f"memcnn couples blocks in pairs: depth must be even, not {len(branches)}")
        pairs = zip(branches[::2], branches[1::2], strict=True)
        self.couplings = nn.ModuleList(
            # Only the first one keeps its input: memcnn frees the storage of a coupling's input, which would be the
            # caller's batch here.
            memcnn.InvertibleModuleWrapper(memcnn.AdditiveCoupling(Fm=f, Gm=g), keep_input=index == 0)
            for index, (f, g) in enumerate(pairs)
        )

    def forward(self, x: Tensor) -> Tensor:
        for coupling in self.couplings:
            x = coupling(x)
        return x


def build_memcnn(depth: int, channels: int) -> nn.Module:
    """memcnn 1.5.2, `InvertibleModuleWrapper` around `AdditiveCoupling`. The depth must be even."""
    return MemcnnStack(branches(depth, channels))


def build_revlib(depth: int, channels: int) -> nn.Module:
    """revlib 1.7.2, `ReversibleSequential` in its default memory mode: each module is one block of ours."""
    import revlib

    return revlib.ReversibleSequential(*branches(depth, channels))


CONTENDERS: dict[str, Builder] = {
    "plain": build_plain,
    "checkpoint": build_checkpoint,
    "memcnn": build_memcnn,
    "revlib": build_revlib,
}


def step(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Forward, loss and backward; the loss and the gradient of the images."""
    images = images.detach().requires_grad_()
    loss = model(images * 1.0).square().mean()  # a non-leaf goes in, as in a network
    loss.backward()
    assert images.grad is not None
    return loss.detach(), images.grad


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--channels", type=int, default=8)
    options = parser.parse_args()
    torch.manual_seed(1)
    images = torch.randn(4, 2 * options.channels, 12, 12)
    reference: tuple[Tensor, Tensor, list[Tensor]] | None = None
    print(f"{'contender':12}{'BN updates/step':>16}{'loss':>10}{'max gradient error':>20}{'finite':>8}")
    for name, build in CONTENDERS.items():
        model = build(options.depth, options.channels).train()
        loss, gradient = step(model, images)
        missing = [key for key, value in model.named_parameters() if value.grad is None]
        assert not missing, f"{name}: no gradient for {missing}"
        gradients = [gradient, *(value.grad for value in model.parameters() if value.grad is not None)]
        # By shape and order of construction: each library registers the branches in its own order.
        print(name, loss)
        del reference
        reference = (loss, gradient, gradients)


if __name__ == "__main__":
    with warnings.catch_warnings():
        main()
