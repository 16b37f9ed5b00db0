"""relu of two streams and a gradient through one: the bits of the operations that they stand for."""

import pytest
import torch
from torch import Tensor

from petra_zoo.reversible import rectified
from petra_zoo.reversible.coupling import merge
from petra_zoo.reversible.rectified import add_passed, merge_rectified

DTYPES = [torch.bfloat16, torch.float32, torch.float64]
SHAPE = (2, 8, 5, 5)


def stream(seed: int, dtype: torch.dtype) -> Tensor:
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)).to(dtype)
    x.view(-1)[:4] = torch.tensor([0.0, -0.0, float("inf"), float("nan")])
    return x


def same_bits(x: Tensor, y: Tensor) -> bool:
    return x.dtype == y.dtype and torch.equal(x.isnan(), y.isnan()) and torch.equal(x.nan_to_num(), y.nan_to_num())


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_mean_is_the_merge_of_both_activations(dtype: torch.dtype) -> None:
    b, a = (stream(seed, dtype).requires_grad_() for seed in (0, 1))
    found, expected = merge_rectified(b, a), merge(b.relu(), a.relu(), 1.0)
    assert same_bits(found, expected)
    d = stream(2, dtype)
    for x, y in zip(torch.autograd.grad(found, (b, a), d), torch.autograd.grad(expected, (b, a), d), strict=True):
        assert same_bits(x, y)


def test_the_mean_can_be_differentiated_twice_and_vectorised() -> None:
    b, a = (torch.randn(SHAPE, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradgradcheck(merge_rectified, (b, a))
    assert torch.equal(torch.func.vmap(merge_rectified)(b, a), merge_rectified(b, a))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("over", [False, True])
def test_a_gradient_passes_where_relu_lets_it(dtype: torch.dtype, over: bool) -> None:
    b, d, d_h = stream(3, dtype).requires_grad_(), stream(4, dtype), stream(5, dtype)
    (passed,) = torch.autograd.grad(b.relu(), b, d_h)
    expected = d + passed
    found = add_passed(d, d_h, b.detach(), over)
    assert same_bits(found, expected)
    assert (found is d) == over
    assert same_bits(add_passed(None, d_h, b.detach()), passed)


@pytest.mark.slow  # inductor compiles C++
@pytest.mark.timeout(600)
@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_functions_have_the_bits_of_the_written_ones(dtype: torch.dtype) -> None:
    x, y, z = (stream(seed, dtype).to(memory_format=torch.channels_last) for seed in (6, 7, 8))
    for function, tensors in (
        (rectified._mean, (x, y)),
        (rectified._halves_passed, (x, y, z)),
        (rectified._add_passed, (x, y, z)),
    ):
        for found, expected in zip(function.compiled(*tensors), function.written(*tensors), strict=True):
            assert same_bits(found, expected), function.written.__name__
            assert found.stride() == expected.stride()
