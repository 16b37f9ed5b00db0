"""The gain s of a branch, and whole blocks, of which no branch is known: gradients, inverse, and the plain network."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from petra_zoo.reversible import CoupledUnit, StreamType, Unit, backpropagate
from tests.reversible.blocks import Coupling, gradients, parameters_of, run_plainly, worst


class Residual(nn.Module):
    """B = id + F."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, h: Tensor) -> Tensor:
        return h + self.branch(h)


def units(depth: int, g: float, gain: float, *, whole: bool, starts: bool, kind: StreamType) -> list[Unit]:
    torch.manual_seed(0)
    found: list[Unit] = []
    for i in range(depth):
        f = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 6)).double()
        block = Residual(f) if whole else f
        found.append(
            CoupledUnit(
                f"block{i}",
                block,
                branch=block,
                activate=lambda x: x,
                coupling=Coupling(g),
                starts=starts and i == 0,
                streams=kind,
                gain=Coupling(gain),
                whole=whole,
            )
        )
    return found


def tokens(count: int) -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    return tuple(torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True) for _ in range(count))


@settings(max_examples=40, deadline=None)
@given(
    g=st.integers(64, 256).map(lambda n: n / 256),
    gain=st.integers(1, 512).map(lambda n: n / 256),
    whole=st.booleans(),
    starts=st.booleans(),
)
def test_gradients_are_those_of_autograd(g: float, gain: float, whole: bool, starts: bool) -> None:
    run = units(3, g, gain, whole=whole, starts=starts, kind=StreamType())
    streams = tokens(1 if starts else 2)
    wanted = [*streams, *parameters_of(run)]
    of_plain, plain = gradients(lambda: run_plainly(run, streams), wanted)
    of_reversible, reversible = gradients(lambda: backpropagate(run, streams), wanted)
    assert all(map(torch.equal, of_plain, of_reversible))
    assert worst(reversible, plain) < 1e-9


@pytest.mark.parametrize("whole", [False, True])
def test_the_inverse_gives_the_streams_back(whole: bool) -> None:
    run = units(4, 0.5, 1.5, whole=whole, starts=False, kind=StreamType())
    streams = tuple(x.detach() for x in tokens(2))
    with torch.no_grad():
        back = run_plainly(run, streams)
    for unit in reversed(run):
        back = unit.reverse(back, tuple(map(torch.zeros_like, back)), []).inputs
    assert worst(back, streams) < 1e-13


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("kind", [StreamType(grid=2.0**-10), StreamType(kind="fixed16")])
def test_at_1_a_grid_makes_the_inverse_exact(whole: bool, kind: StreamType) -> None:
    run = units(12, 1.0, 2.0, whole=whole, starts=False, kind=kind)
    for unit in run:
        unit.float()
    streams = tuple(kind.now(lambda: 1.0, run[0]).snap(x.detach().float()) for x in tokens(2))
    with torch.no_grad():
        back = run_plainly(run, streams)
    for unit in reversed(run):
        back = unit.reverse(back, (None, None), []).inputs
    bits = torch.int16 if kind.kind == "fixed16" else torch.float32
    assert all(torch.equal(x.view(bits), y.view(bits)) for x, y in zip(back, streams, strict=True))


@pytest.mark.parametrize("gain", [1.0, 1.5])
def test_at_0_a_whole_block_gives_what_it_gives_alone(gain: float) -> None:
    run = units(3, 0.0, gain, whole=True, starts=True, kind=StreamType())
    (x,) = tokens(1)
    expected = x
    for unit in run:
        assert isinstance(unit, CoupledUnit)
        expected = unit.block(expected)
    assert torch.equal(run_plainly(run, (x,))[0], expected)


@pytest.mark.parametrize("g", [0.0, 0.5, 1.0])
def test_a_whole_block_starts_a_run_as_it_is(g: float) -> None:
    (unit,) = units(1, g, 1.75, whole=True, starts=True, kind=StreamType())
    (x,) = tokens(1)
    assert isinstance(unit, CoupledUnit)
    assert torch.equal(unit(x)[0], unit.block(x))


def test_a_whole_block_that_does_nothing_has_gradients() -> None:
    nothing = nn.Identity()
    run: list[Unit] = [
        CoupledUnit(
            f"block{i}", nothing, branch=nothing, activate=nothing, coupling=lambda: 0.5, starts=i == 0, whole=True
        )
        for i in range(3)
    ]
    (x,) = tokens(1)
    _, plain = gradients(lambda: run_plainly(run, (x,)), [x])
    _, reversible = gradients(lambda: backpropagate(run, (x,)), [x])
    assert worst(reversible, plain) < 1e-14
