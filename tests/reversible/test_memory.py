"""Live tensor bytes: the counter itself, and that a run's memory does not grow with its depth."""

from collections import Counter

import torch
import torch.nn.functional as F
from torch import Tensor

from petra_zoo.reversible import FunctionUnit, LiveBytes, backpropagate
from tests.reversible.blocks import make_run, parameters_of, run_plainly


def step_peak(depth: int, reversible: bool) -> int:
    """Peak live bytes of a training step; parameters, their gradients and buffers apart."""
    units = make_run(depth, channels=16, dtype=torch.float32)
    x = torch.randn(16, 16, 32, 32)

    def step() -> None:
        out = backpropagate(units, (x,)) if reversible else run_plainly(units, (x,))
        (out[0].square().mean() + out[1].square().mean()).backward()

    step()  # gradients exist from here on
    apart: list[Tensor] = [x]
    for p in parameters_of(units):
        assert p.grad is not None
        apart += [p, p.grad]
    with LiveBytes([*apart, *(b for unit in units for b in unit.buffers())]) as memory:
        step()
    return memory.peak


def test_memory_does_not_grow_with_depth() -> None:
    """16 blocks exceed 8 by less than 1 % of what plain backpropagation adds."""
    plain = step_peak(16, reversible=False) - step_peak(8, reversible=False)
    ours = step_peak(16, reversible=True) - step_peak(8, reversible=True)
    assert plain > 8 * 4 * 16 * 16 * 32 * 32  # at least one activation per block
    # What does grow is one gradient per parameter, handed to autograd when the run's backward ends.
    assert ours < 0.01 * plain


def test_the_count_is_the_same_every_time() -> None:
    assert step_peak(4, reversible=True) == step_peak(4, reversible=True)


def test_a_tensor_counts_while_it_lives() -> None:
    with LiveBytes() as memory:
        x = torch.zeros(1000)
        y = x + 1
        del x
        torch.zeros(1)
        assert memory.now == 4004 or memory.now == 4000  # the last zero may be gone already
    assert memory.peak >= 8000
    assert y.shape == (1000,)


def test_views_and_tensors_from_outside_do_not_count() -> None:
    x = torch.zeros(1000)
    with LiveBytes() as memory:
        x.view(10, 100).mul_(2)
        assert memory.peak == 0


def test_memory_freed_by_resizing_a_storage_is_seen() -> None:
    with LiveBytes() as memory:
        x = torch.zeros(1000)
        x.untyped_storage().resize_(0)
        torch.zeros(1)
        assert memory.now <= 4


def test_an_activation_is_computed_twice_on_the_way_back_only_where_streams_are_widest() -> None:
    called: Counter[int] = Counter()

    def activate(h: Tensor) -> Tensor:
        called[h.shape[1]] += 1
        return F.relu(h)

    def narrower(b: Tensor, a: Tensor) -> tuple[Tensor]:
        return ((b + a)[:, :4],)

    wide, narrow = (make_run(2, channels, activate=activate) for channels in (8, 4))
    units = [*wide, FunctionUnit("between", narrower, {}), *narrow]
    out = backpropagate(units, (torch.randn(2, 8, 5, 5, dtype=torch.float64),))
    assert called == {8: 2, 4: 2}
    out[0].sum().backward()
    assert called == {8: 6, 4: 4}
