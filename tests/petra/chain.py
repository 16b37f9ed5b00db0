"""A chain of small matrices, for tests of what the engine does with parameters: a stem, coupled units and a head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from petra_zoo.petra import Costs, Layout, Optimization, Pipeline, World
from petra_zoo.reversible import CoupledUnit, FunctionUnit, Streams, Unit

WIDTH, CLASSES = 6, 4


class Chain(nn.Module):
    """(x) -> b = W x; (b, a) -> (a + tanh(W b), b), from a = b, `depth` times; (b, a) -> W (b + a)."""

    def __init__(self, depth: int = 3, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        heights = [WIDTH] * (depth + 1) + [CLASSES]
        self.layers = nn.ModuleList(nn.Linear(WIDTH, height, bias=False).double() for height in heights)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) / WIDTH**0.5)

    def units(self) -> list[Unit]:
        stem, *middle, head = self.layers
        return [
            FunctionUnit("stem", lambda x: (stem(x),), {"layer": stem}),
            *(self._coupled(i, layer) for i, layer in enumerate(middle)),
            FunctionUnit("head", lambda b, a: (head(b + a),), {"layer": head}),
        ]

    def _coupled(self, i: int, layer: nn.Module) -> Unit:
        return CoupledUnit(
            f"block{i}",
            layer,
            branch=lambda h: torch.tanh(layer(h)),
            activate=lambda x: x,
            coupling=lambda: 1.0,
            starts=i == 0,
        )

    def forward(self, x: Tensor) -> Tensor:
        streams: Streams = (x,)
        for unit in self.units():
            streams = unit(*streams)
        return streams[0]


def data(n: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    draw = lambda: torch.randn(5, WIDTH, generator=generator, dtype=torch.float64)  # noqa: E731
    return [(draw(), torch.randint(0, CLASSES, (5,), generator=generator)) for _ in range(n)]


def make_chain_pipeline(
    model: Any,
    split: Sequence[int] = (1, 1, 1, 1, 1),
    *,
    method: str = "petra",
    world: World | None = None,
    autocast: torch.dtype | None = None,
    on_nonfinite: Any = "stop",
    graphs: Any = "auto",
    **optimization: Any,
) -> Pipeline:
    """A pipeline of the chain, one unit per stage unless said otherwise."""
    costs = Costs([1.0] * len(model.layers), [1.0] * len(model.layers))
    layout = Layout.of(model, list(split), method=method, ranks=world.size if world else 1, costs=costs)
    return Pipeline(
        model,
        layout,
        method=method,
        optimization=Optimization(**optimization),
        autocast=autocast,
        world=world,
        on_nonfinite=on_nonfinite,
        graphs=graphs,
    )
