"""Branches in parts: the same value and gradients as the whole, and less memory on the way back."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from petra_zoo.errors import UserError
from petra_zoo.reversible import CoupledUnit, LiveBytes, backpropagate
from petra_zoo.reversible.parts import PartedBranch, RowChunks, SummedParts

WIDTH = 8
Make = Callable[[nn.Sequential], PartedBranch]


def mlp(width: int = WIDTH, drop: float = 0.0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(drop), nn.Linear(4 * width, width)
    return nn.Sequential(nn.LayerNorm(width), *layers).to(dtype)


def chunks(module: nn.Sequential, drop: Any = None) -> PartedBranch:
    return RowChunks(module, 3, drop)


def halves(module: nn.Sequential, drop: Any = None) -> PartedBranch:
    """The hidden units in two halves."""
    norm, up, act, dropped, down = module

    def half(i: int, n: Tensor) -> Tensor:
        inner = slice(i * up.out_features // 2, (i + 1) * up.out_features // 2)
        hidden = dropped(act(nn.functional.linear(n, up.weight[inner], up.bias[inner])))
        return nn.functional.linear(hidden, down.weight[:, inner], None if i else down.bias)

    return SummedParts(norm, [lambda n: half(0, n), lambda n: half(1, n)], drop)


def unit(module: nn.Module, branch: Callable[[Tensor], Tensor], name: str = "unit", **kwargs: Any) -> CoupledUnit:
    settings = {"activate": lambda b: b, "coupling": lambda: 1.0, **kwargs}
    return CoupledUnit(name, module, branch=branch, **settings)


def streams(dtype: torch.dtype = torch.float64, shape: tuple[int, ...] = (5, 7, WIDTH)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    b, a = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for _ in range(2))
    return b, a


def gradients(units: list[CoupledUnit], seed: int = 0, reconstruct: bool = True) -> list[Tensor]:
    """Outputs, and gradients of both streams and of all parameters."""
    b, a = streams()
    torch.manual_seed(seed)
    if reconstruct:
        outputs = backpropagate(units, (b, a))
    else:
        outputs = (b, a)
        for each in units:
            outputs = each(*outputs)
    weights = streams()[::-1]
    parameters = [p for each in units for p in each.parameters()]
    loss = sum((y * w.detach()).sum() for y, w in zip(outputs, weights, strict=True))
    return [*outputs, *torch.autograd.grad(loss, [b, a, *parameters])]


def close(found: list[Tensor], expected: list[Tensor]) -> None:
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("g", [1.0, 0.5])
@pytest.mark.parametrize("make", [chunks, halves])
def test_value_and_gradients_are_those_of_the_whole_branch(make: Make, g: float) -> None:
    module, settings = mlp(), {"coupling": lambda: g, "gain": lambda: 1.5}
    whole, parted = unit(module, module, **settings), unit(module, make(module), **settings)
    close(gradients([parted, parted]), gradients([whole, whole], reconstruct=False))


@pytest.mark.parametrize("make", [chunks, halves])
def test_random_numbers_are_those_of_the_forward(make: Any) -> None:
    """Dropout inside, and a mask over the whole branch."""
    module = mlp(drop=0.3)
    drop = lambda h: nn.functional.dropout(h.new_ones(len(h), 1, 1), 0.4)  # noqa: E731
    parted = unit(module, make(module, drop))
    found, expected = gradients([parted], 3), gradients([parted], 3, reconstruct=False)
    assert torch.equal(found[0], expected[0])
    close(found, expected)
    assert not torch.equal(gradients([parted], 4)[0], expected[0])


@pytest.mark.parametrize("make", [chunks, halves])
def test_under_autocast_the_gradients_are_those_of_ordinary_operations(make: Make) -> None:
    module = mlp(dtype=torch.float32)
    parted = unit(module, make(module))
    b, a = streams(torch.float32)
    found = []
    for run in (lambda: backpropagate([parted], (b, a)), lambda: parted(b, a)):
        with torch.autocast("cpu", torch.bfloat16):
            loss = run()[0].square().sum()
        found.append(torch.autograd.grad(loss, [b, a, *module.parameters()]))
    for x, y in zip(*found, strict=True):
        assert x.dtype == y.dtype
        torch.testing.assert_close(x, y, rtol=0.05, atol=0.05)


def test_a_frozen_part_has_no_gradient() -> None:
    module = mlp()
    module[1].requires_grad_(False)
    b, a = streams()
    backpropagate([unit(module, chunks(module))], (b, a))[0].sum().backward()
    assert module[1].weight.grad is None
    assert module[4].weight.grad is not None
    assert b.grad is not None


def test_more_chunks_than_tokens_are_as_many_as_there_are() -> None:
    module = mlp()
    whole = unit(module, module)
    close(gradients([unit(module, RowChunks(module, 100))]), gradients([whole]))


def test_no_chunks_are_refused() -> None:
    with pytest.raises(UserError, match="chunks is 1"):
        RowChunks(mlp(), 0)


@pytest.mark.parametrize("make", [chunks, halves])
def test_the_whole_graph_never_stands_at_the_peak(make: Make) -> None:
    module = mlp(16, dtype=torch.float32)
    peaks = {}
    for name, branch in (("whole", module), ("parted", make(module))):
        b, a = streams(torch.float32, (16, 64, 16))
        with LiveBytes([b, a, *module.parameters()]) as memory:
            backpropagate([unit(module, branch, starts=False)] * 2, (b, a))[0].sum().backward()
        peaks[name] = memory.peak / b.nbytes
    hidden = 4 * 3  # of a stream's size: both sides of the activation, and a gradient
    share = {chunks: 2 / 3, halves: 1 / 2}[make]  # of it that is spared
    assert peaks["parted"] < peaks["whole"] - share * hidden + 3.0, peaks
