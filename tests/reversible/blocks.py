"""Small coupled blocks for the tests of the reversible core, in pure torch."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from petra_zoo.reversible import CoupledUnit, Streams, StreamType, Unit


class Coupling:
    """A coupling that a test can change."""

    def __init__(self, g: float) -> None:
        self.g = g

    def __call__(self) -> float:
        return self.g


def branch(channels: int, *, dropout: float = 0.0, act: type[nn.Module] = nn.SiLU) -> nn.Sequential:
    """conv, BN, act, dropout, conv, BN: the residual branch of a basic block."""
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        act(),
        nn.Dropout(dropout),
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels),
    )


def make_run(
    depth: int,
    channels: int = 6,
    g: float = 1.0,
    *,
    starts: bool = True,
    anchor_every: int = 0,
    grid: float = 0.0,
    dropout: float = 0.0,
    activate: Callable[[Tensor], Tensor] = F.relu,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> list[CoupledUnit]:
    """A run of coupled blocks whose last norm is scaled down, as in a trained network."""
    torch.manual_seed(seed)
    units = []
    coupling = Coupling(g)
    for i in range(depth):
        f = branch(channels, dropout=dropout).to(dtype)
        nn.init.constant_(f[-1].weight, 0.3)
        units.append(
            CoupledUnit(
                f"block{i}",
                f,
                branch=f,
                activate=activate,
                coupling=coupling,
                starts=starts and i == 0,
                anchor=anchor_every > 0 and i > 0 and i % anchor_every == 0,
                streams=StreamType(grid),
            )
        )
    return units


def run_plainly(units: Sequence[Unit], streams: Streams) -> Streams:
    for unit in units:
        streams = unit(*streams)
    return streams


def parameters_of(units: Sequence[Unit]) -> list[nn.Parameter]:
    return [p for unit in units for p in unit.parameters()]


def gradients(
    forward: Callable[[], Streams], wanted: Sequence[Tensor], seed: int = 1
) -> tuple[Streams, tuple[Tensor, ...]]:
    """Outputs, and gradients of a random projection of them."""
    outputs = forward()
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype) for y in outputs]
    return outputs, torch.autograd.grad(outputs, list(wanted), weights)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30))


def worst(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> float:
    return max(relative(x, y) for x, y in zip(xs, ys, strict=True))
