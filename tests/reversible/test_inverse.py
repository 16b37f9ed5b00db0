"""The inverse reconstructs a run's input: to the predicted error, or to the bit in exact mode."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from petra_zoo.reversible import Streams, StreamType, advance, couple, uncouple
from tests.reversible.blocks import make_run, relative


def invert(units, outputs: Streams) -> Streams:  # type: ignore[no-untyped-def]
    zeros = tuple(torch.zeros_like(x) for x in outputs)
    for unit in reversed(units):
        outputs, zeros, _ = unit.reverse(outputs, zeros, [])
    return outputs


def forward(units, streams: Streams) -> Streams:  # type: ignore[no-untyped-def]
    with torch.no_grad():
        for unit in units:
            streams = unit(*streams)
    return streams


@pytest.mark.parametrize(("g", "depth"), [(1.0, 16), (0.5, 8), (0.25, 5), (0.125, 4)])
def test_inverse_of_forward_is_the_identity_up_to_the_predicted_error(g: float, depth: int) -> None:
    """Rounding grows by about 1/g per inverted block; a run of n blocks inverts n - 1 (the first is a copy)."""
    units = make_run(depth, g=g, starts=False, dtype=torch.float32)
    torch.manual_seed(5)
    b, a = torch.randn(4, 6, 8, 8), torch.randn(4, 6, 8, 8)
    b_back, a_back = invert(units, forward(units, (b, a)))
    predicted = 6e-8 * g**-depth
    assert max(relative(b_back, b), relative(a_back, a)) < 30 * predicted  # the rule orders, it is too low by 5 to 9


def test_a_run_that_starts_gives_its_one_input_back() -> None:
    units = make_run(6)
    x = torch.randn(3, 6, 6, 6, dtype=torch.float64)
    (back,) = invert(units, forward(units, (x,)))
    assert relative(back, x) < 1e-12


@pytest.mark.parametrize("bits", [10, 12, 14])
def test_exact_mode_reconstructs_35_blocks_to_the_bit_in_float32(bits: int) -> None:
    grid = 2.0**-bits
    units = make_run(35, g=1.0, grid=grid, dtype=torch.float32)
    torch.manual_seed(6)
    x = StreamType(grid).snap(torch.randn(4, 6, 8, 8))
    (back,) = invert(units, forward(units, (x,)))
    assert float((back - x).abs().max()) == 0.0


def test_without_exact_mode_35_blocks_do_not_reconstruct_to_the_bit() -> None:
    units = make_run(35, g=1.0, dtype=torch.float32)
    torch.manual_seed(6)
    x = torch.randn(4, 6, 8, 8)
    (back,) = invert(units, forward(units, (x,)))
    assert float((back - x).abs().max()) > 0.0


def test_exact_mode_reconstructs_with_the_branch_in_bfloat16() -> None:
    grid = 2.0**-10
    units = make_run(20, g=1.0, grid=grid, dtype=torch.float32)
    x = StreamType(grid).snap(torch.randn(4, 6, 8, 8))
    with torch.autocast("cpu", torch.bfloat16):
        (back,) = invert(units, forward(units, (x,)))
    assert torch.equal(back, x)


def test_exact_mode_passes_gradients_straight_through() -> None:
    x = torch.randn(5, requires_grad=True)
    StreamType(2.0**-3).snap(x).sum().backward()
    assert torch.equal(x.grad, torch.ones(5))


def test_exact_mode_refuses_values_that_do_not_fit_its_grid() -> None:
    with pytest.raises(ValueError, match=r"exact inversion needs \|stream\| < 4096"):
        StreamType(2.0**-12).snap(torch.tensor([5000.0]))


@settings(max_examples=200, deadline=None)
@given(
    g=st.integers(1, 256).map(lambda n: n / 256),
    values=st.lists(st.floats(-100, 100), min_size=3, max_size=3),
)
def test_uncouple_inverts_couple(g: float, values: list[float]) -> None:
    h, f, a = (torch.tensor(v, dtype=torch.float64) for v in values)
    step = advance(h, f, g)
    assert torch.allclose(uncouple(couple(step, a, g), step, g), a, rtol=0, atol=1e-13 / g * 100)


@given(values=st.lists(st.floats(-100, 100), min_size=2, max_size=2))
def test_a_coupling_of_zero_is_the_plain_residual_sum(values: list[float]) -> None:
    h, f = (torch.tensor(v, dtype=torch.float64) for v in values)
    assert torch.equal(advance(h, f, 0.0), h + f)
