"""Packed streams: the same bits as floats on the grid, as written and as compiled."""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from petra_zoo.errors import UserError
from petra_zoo.reversible import packed
from petra_zoo.reversible.batch_statistics import RememberStatistics, UseStatistics
from petra_zoo.reversible.fixed_point import rounded
from petra_zoo.reversible.fused import Fused
from petra_zoo.reversible.saturation import Saturation

GRID = 2.0**-6
SHAPE = (2, 8, 5, 5)


def numbers(seed: int, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)).bfloat16()


def stream(seed: int) -> Tensor:
    return packed.pack(numbers(seed), GRID)


def test_packing_rounds_to_the_grid_as_floats_do() -> None:
    x = numbers(0)
    assert torch.equal(packed.unpack(packed.pack(x, GRID), GRID), rounded(x.float(), GRID, packed.MOST))


def test_a_difference_undoes_a_sum_to_the_bit() -> None:
    f, a = numbers(1), stream(2)
    b = packed.add(f, a, GRID)
    assert torch.equal(packed.unpack(b, GRID), rounded(f.float(), GRID, packed.MOST) + packed.unpack(a, GRID))
    assert torch.equal(packed.subtract(b, packed.pack(f, GRID)).view(torch.int16), a.view(torch.int16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_activations_and_their_gradients_are_those_of_numbers(dtype: torch.dtype) -> None:
    b, a = (stream(seed).requires_grad_() for seed in (3, 4))
    number_b, number_a = (packed.unpack(x, GRID).detach().requires_grad_() for x in (b, a))
    found = packed.rectify(b, GRID, dtype).float() + packed.mean_rectified(b, a, GRID, dtype)
    expected = number_b.relu().to(dtype).float() + ((number_b.relu() + number_a.relu()) / 2.0).to(dtype)
    assert torch.equal(found, expected)
    weights = numbers(5).float()
    gradients = torch.autograd.grad(found, (b, a), weights)
    for x, y in zip(gradients, torch.autograd.grad(expected, (number_b, number_a), weights), strict=True):
        assert x.dtype == torch.bfloat16
        assert torch.allclose(x.float(), y, rtol=2.0**-7)


@pytest.mark.parametrize("value", [600.0, float("inf"), float("nan")])
def test_what_leaves_the_range_raises_and_saturates(value: float) -> None:
    saturation = Saturation()
    f = torch.full(SHAPE, value).bfloat16()
    with pytest.raises(UserError, match=rf"needs \|stream\| < 511.*, found ({value:g}|nan)"):
        packed.add(f, stream(6), GRID, saturation)
    if value == value:
        assert torch.equal(packed.unpack(packed.pack(f, GRID), GRID), torch.full(SHAPE, packed.MOST * GRID))


def test_without_a_compiler_a_function_runs_as_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    fused = Fused(lambda x, grid: (x * grid,))

    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no compiler")

    class OnCuda(torch.Tensor):
        is_cuda = True

    monkeypatch.setattr(fused, "_compiled", broken)
    x = numbers(7).as_subclass(OnCuda)
    assert torch.equal(fused(x, grid=2.0)[0], x * 2.0)
    assert not fused.compiles


def test_a_compiled_function_has_one_variant_whatever_is_around() -> None:
    fused = Fused(lambda x, grid: (x * grid,))
    variants = CompileCounter()
    fused._compiled = torch.compile(fused.written, dynamic=True, fullgraph=True, backend=variants)
    x = numbers(7)
    for mode in (nullcontext(), RememberStatistics(), UseStatistics([]), torch.autocast("cpu", torch.bfloat16)):
        with mode, torch.no_grad():
            assert torch.equal(fused.compiled(x, grid=2.0)[0], x * 2.0)
    assert variants.frame_count == 1


@pytest.mark.slow  # inductor compiles C++
@pytest.mark.timeout(600)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_compiled_functions_have_the_bits_of_the_written_ones(layout: torch.memory_format) -> None:
    f, g = (numbers(seed, 100.0).to(memory_format=layout) for seed in (8, 9))
    b, a = (stream(seed).to(memory_format=layout) for seed in (10, 11))
    calls = [
        (packed._pack, (f,), {"grid": GRID}),
        (packed._pack_sum, (f.float(), g), {"grid": GRID}),
        (packed._add, (f, a), {"grid": GRID, "dropped": 0}),
        (packed._add, (f, a), {"grid": GRID, "dropped": 3}),
        (packed._subtract, (b, a), {}),
        (packed._restore, (b, a, (b.view(torch.int16) & 7).to(torch.uint8)), {"dropped": 3}),
        (packed._unpack, (b,), {"grid": GRID, "dtype": torch.float32}),
        (packed._rectify, (b,), {"grid": GRID, "dtype": torch.bfloat16}),
        (packed._mean_rectified, (b, a), {"grid": GRID, "dtype": torch.bfloat16}),
        (packed._where_positive, (g, b), {}),
        (
            packed._halves_where_positive,
            (g, torch.randint(0, 4, SHAPE, dtype=torch.uint8).to(memory_format=layout)),
            {},
        ),
    ]
    for function, tensors, settings in calls:
        found, expected = function.compiled(*tensors, **settings), function.written(*tensors, **settings)
        for x, y in zip(found, expected, strict=True):
            bits = [z.view(torch.int16) if z.dtype == torch.bfloat16 else z for z in (x, y)]
            assert torch.equal(*bits), function.written.__name__
            assert x.stride() == y.stride()
