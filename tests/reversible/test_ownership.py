"""What going backwards writes over is the core's own: everybody else's tensors stay as they are."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from petra_zoo.reversible import CoupledUnit, FunctionUnit, LiveBytes, Streams, Unit, backpropagate, gradients_of
from petra_zoo.reversible.ownership import Lent
from tests.reversible.blocks import gradients, make_run, parameters_of, run_plainly, worst

SHAPE = (3, 6, 6, 6)


def streams(count: int) -> Streams:
    generator = torch.Generator().manual_seed(3)
    return tuple(torch.randn(SHAPE, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(count))


def head() -> Unit:
    conv = nn.Conv2d(6, 4, 1).double()
    return FunctionUnit("head", lambda b, a: (conv(F.relu(b)) + conv(F.relu(a)),), {"conv": conv})


def adding() -> Unit:
    """Hands one gradient to both streams."""
    return FunctionUnit("adding", lambda b, a: (b + a,), {})


def joining() -> Unit:
    """Hands views of one gradient to the streams."""
    return FunctionUnit("joining", lambda b, a: (torch.cat((b, a), 1),), {})


def counting() -> Unit:
    """Hands expanded gradients to the streams."""
    return FunctionUnit("counting", lambda b, a: (b.sum() + 2 * a.sum(),), {})


@pytest.mark.parametrize("end", [head, adding, joining, counting])
@pytest.mark.parametrize("g", [1.0, 0.5])
@pytest.mark.parametrize("activate", [F.relu, F.silu, lambda x: x, lambda x: 2 * x])
def test_gradients_are_those_of_the_plain_path(
    end: Callable[[], Unit], g: float, activate: Callable[[Tensor], Tensor]
) -> None:
    units = [*make_run(4, g=g, starts=False, activate=activate), end()]
    given = streams(2)
    wanted = [*given, *parameters_of(units)]
    _, expected = gradients(lambda: run_plainly(units, given), wanted)
    _, found = gradients(lambda: backpropagate(units, given), wanted)
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-8, atol=1e-10)


class Shift(nn.Module):
    """An identity beside a parameter: autograd hands one gradient to both where a batch has one image."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.randn(1, *SHAPE[1:], dtype=torch.float64))

    def forward(self, h: Tensor) -> Tensor:
        return h + self.shift


def test_a_parameters_gradient_is_no_streams_memory() -> None:
    blocks = [Shift() for _ in range(4)]
    units: list[Unit] = [
        CoupledUnit(f"block{i}", block, branch=block, activate=lambda x: x, coupling=lambda: 1.0)
        for i, block in enumerate(blocks)
    ]
    units.append(head())
    given = tuple(x[:1].detach().requires_grad_() for x in streams(2))
    wanted = [*given, *parameters_of(units)]
    _, expected = gradients(lambda: run_plainly(units, given), wanted)
    _, found = gradients(lambda: backpropagate(units, given), wanted)
    assert worst(found, expected) < 1e-12


@pytest.mark.parametrize("depth", [1, 4])
def test_the_callers_tensors_stay(depth: int) -> None:
    units = make_run(depth, starts=False)
    given = streams(2)
    outputs = backpropagate(units, given)
    weights = [torch.ones_like(x) for x in outputs]
    before = [x.clone() for x in (*given, *outputs, *weights)]
    torch.autograd.grad(outputs, given, weights)
    assert all(torch.equal(x, y) for x, y in zip((*given, *outputs, *weights), before, strict=True))


def test_hooks_keep_what_they_have_seen() -> None:
    units = [*make_run(4, starts=False), head()]
    seen: list[tuple[Tensor, Tensor]] = []

    def pack(x: Tensor) -> Tensor:
        seen.append((x, x.clone()))
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        (out,) = backpropagate(units, streams(2))
    out.sum().backward()
    assert seen
    assert all(torch.equal(x, y) for x, y in seen)


def test_a_retained_graph_gives_the_same_until_it_is_gone() -> None:
    units = [*make_run(4, starts=False), head()]
    given = streams(2)
    loss = backpropagate(units, given)[0].square().sum()
    found = [torch.autograd.grad(loss, given, retain_graph=keep) for keep in (True, True, False)]
    assert all(torch.equal(x, y) for more in found[1:] for x, y in zip(more, found[0], strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, given)


def test_an_owned_reversal_equals_one_that_is_not() -> None:
    for g in (1.0, 0.5):
        (unit,) = make_run(1, g=g, starts=False)
        outputs = tuple(x.detach() for x in unit(*streams(2)))
        given = tuple(torch.randn_like(x) for x in outputs)
        own = list(unit.parameters())
        expected = unit.reverse(outputs, given, own)
        found = unit.reverse(tuple(map(torch.clone, outputs)), tuple(map(torch.clone, given)), own, owned=True)
        for mine, theirs in zip(found, expected, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(mine, theirs, strict=True))


def test_a_random_activation_is_evaluated_once() -> None:
    units = [*make_run(3, starts=False, activate=lambda x: F.rrelu(x, training=True)), head()]
    given = streams(2)
    wanted = [*given, *parameters_of(units)]
    found = []
    for run in (run_plainly, backpropagate):
        torch.manual_seed(0)
        found.append(torch.autograd.grad(run(units, given)[0].square().sum(), wanted))
    assert worst(*found) < 1e-9


def test_gradients_share_no_memory() -> None:
    x, y = streams(2)
    d = torch.ones_like(x)
    found = gradients_of((x + y,), (d,), [x, y])
    assert all(g is not None for g in found)
    assert Lent([d]).none_of(found)


def test_a_coupled_block_takes_seven_tensors_as_wide_as_a_stream() -> None:
    """Two streams and two gradients, and h with its gradient and that of b, or two tensors of the branch."""
    wide, narrow, blocks = 64, 8, 3

    def branch() -> nn.Sequential:
        layers = [nn.Conv2d(wide, narrow, 1), nn.BatchNorm2d(narrow), nn.ReLU(), nn.Conv2d(narrow, wide, 1)]
        return nn.Sequential(*layers, nn.BatchNorm2d(wide)).to("meta")

    stem = nn.Conv2d(1, wide, 1, device="meta")
    units: list[Unit] = [FunctionUnit("stem", lambda x: (stem(x), stem(x)), {"stem": stem})]
    for i in range(blocks):
        f = branch()
        units.append(CoupledUnit(f"block{i}", f, branch=Unheld(f).run, activate=F.relu, coupling=lambda: 1.0))
    conv = nn.Conv2d(wide, 1, 1, device="meta")
    units.append(FunctionUnit("head", lambda b, a: (conv(b) + conv(a),), {"conv": conv}))
    images = torch.empty(2**14, 1, 8, 8, device="meta")
    with LiveBytes([images]) as memory:
        (out,) = backpropagate(units, (images,))
        out.sum().backward()
    stream = wide * images.nbytes
    assert memory.peak < 7.05 * stream


class Unheld:
    """A branch that holds its argument no longer than its first layer reads it."""

    def __init__(self, layers: nn.Sequential) -> None:
        self.layers = layers

    def run(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x
