"""Backpropagation through runs equals plain autograd."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from petra_zoo.reversible import CoupledUnit, FunctionUnit, backpropagate, segments
from petra_zoo.reversible.batch_statistics import RememberStatistics, UseStatistics
from tests.reversible.blocks import Coupling, gradients, make_run, parameters_of, relative, run_plainly, worst


def images(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def compare(units, streams):  # type: ignore[no-untyped-def]
    wanted = [*streams, *parameters_of(units)]
    expected_out, expected = gradients(lambda: run_plainly(units, streams), wanted)
    found_out, found = gradients(lambda: backpropagate(units, streams), wanted)
    assert all(torch.equal(a, b) for a, b in zip(found_out, expected_out, strict=True))
    return worst(found, expected)


@pytest.mark.parametrize(("g", "depth"), [(1.0, 16), (0.5, 8), (0.25, 4), (0.125, 4)])
def test_float64_gradients_equal_autograd(g: float, depth: int) -> None:
    assert compare(make_run(depth, g=g), (images(3, 6, 6, 6),)) < 1e-10


@pytest.mark.parametrize(("g", "anchor_every"), [(0.125, 4), (0.25, 4), (0.5, 6)])
def test_float64_gradients_equal_autograd_at_22_blocks_with_anchors(g: float, anchor_every: int) -> None:
    assert compare(make_run(22, g=g, anchor_every=anchor_every), (images(3, 6, 6, 6),)) < 1e-10


def test_anchors_are_what_keeps_a_long_run_accurate() -> None:
    without = compare(make_run(22, g=0.125), (images(3, 6, 6, 6),))
    assert without > 1e-6


def test_two_different_streams_need_no_start() -> None:
    units = make_run(8, starts=False, activate=lambda x: x)
    assert compare(units, (images(3, 6, 5, 5), images(3, 6, 5, 5, seed=4))) < 1e-10


def test_float32_gradients_with_a_smooth_activation() -> None:
    units = make_run(6, dtype=torch.float32, activate=F.silu)
    assert compare(units, (images(4, 6, 8, 8, dtype=torch.float32),)) < 1e-4


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(2, 4),
    channels=st.integers(1, 5),
    size=st.integers(2, 6),
    depth=st.integers(1, 4),
    g=st.integers(32, 256).map(lambda n: n / 256),
    starts=st.booleans(),
)
def test_gradients_equal_autograd_for_any_shape(
    batch: int, channels: int, size: int, depth: int, g: float, starts: bool
) -> None:
    units = make_run(depth, channels, g, starts=starts)
    streams = tuple(images(batch, channels, size, size, seed=i) for i in range(1 if starts else 2))
    assert compare(units, streams) < 1e-8


def test_dropout_draws_the_same_numbers_in_the_recomputation() -> None:
    units = make_run(5, dropout=0.5)
    x = images(3, 6, 6, 6)
    wanted = [x, *parameters_of(units)]
    torch.manual_seed(11)
    _, expected = gradients(lambda: run_plainly(units, (x,)), wanted)
    after_plain = torch.get_rng_state()
    torch.manual_seed(11)
    _, found = gradients(lambda: backpropagate(units, (x,)), wanted)
    assert worst(found, expected) < 1e-10
    assert torch.equal(torch.get_rng_state(), after_plain), "the recomputation disturbed the global generator"


def test_bfloat16_autocast_is_replayed_and_streams_stay_float32() -> None:
    units = make_run(4, dtype=torch.float32)
    x = images(4, 6, 8, 8, dtype=torch.float32)
    wanted = [x, *parameters_of(units)]
    with torch.autocast("cpu", torch.bfloat16):
        plain = run_plainly(units, (x,))
        saved = backpropagate(units, (x,))
    assert all(stream.dtype == torch.float32 for stream in saved)
    weights = [torch.randn(y.shape, generator=torch.Generator().manual_seed(1)) for y in plain]
    expected = torch.autograd.grad(plain, wanted, weights)  # outside autocast, as users call backward
    found = torch.autograd.grad(saved, wanted, weights)
    # The branch runs in bfloat16 both times; only the reconstruction's rounding differs. Compared as a whole: single
    # batch-norm parameters have gradients near zero.
    flat = [torch.cat([g.flatten() for g in gs]) for gs in (found, expected)]
    assert relative(flat[0], flat[1]) < 2e-2
    full = torch.autograd.grad(run_plainly(units, (x,)), wanted, weights)
    assert relative(flat[0], torch.cat([g.flatten() for g in full])) > 1e-4, "autocast had no effect"


def test_batch_norm_buffers_equal_plain_training_after_a_step() -> None:
    units = make_run(4)
    others = copy.deepcopy(units)
    x = images(3, 6, 6, 6)
    gradients(lambda: run_plainly(others, (x,)), [x])
    gradients(lambda: backpropagate(units, (x,)), [x])
    for mine, plain in zip(units, others, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine.buffers(), plain.buffers(), strict=True))
    assert [int(b) for n, b in units[0].named_buffers() if n.endswith("num_batches_tracked")] == [1, 1]


def test_switching_to_eval_between_forward_and_backward_does_no_harm() -> None:
    units = make_run(4)
    x = images(3, 6, 6, 6)
    _, expected = gradients(lambda: run_plainly(units, (x,)), [x])
    out, other = backpropagate(units, (x,))
    for unit in units:
        unit.eval()
    generator = torch.Generator().manual_seed(1)  # the weights that `gradients` draws
    weights = [torch.randn(y.shape, generator=generator, dtype=torch.float64) for y in (out, other)]
    found = torch.autograd.grad((out, other), [x], weights)
    assert worst(found, expected) < 1e-10
    assert not any(m.training for unit in units for m in unit.modules())


def test_a_frozen_batch_norm_in_a_training_run_uses_its_running_statistics() -> None:
    units = make_run(3)
    for unit in units:
        unit.block[1].eval()
        unit.block[1].running_mean.normal_()
    assert compare(units, (images(3, 6, 6, 6),)) < 1e-10


def test_units_without_an_inverse_are_recomputed_from_their_input() -> None:
    run = make_run(3)
    down = nn.Sequential(nn.Conv2d(6, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6)).double()
    unit = FunctionUnit("down", lambda b, a: (down(b) + down(a),), {"down": down})
    x = images(3, 6, 6, 6)
    units = [*run, unit]
    assert [len(segment) for segment in segments(units)] == [3, 1]
    wanted = [x, *parameters_of(units)]
    _, expected = gradients(lambda: run_plainly(units, (x,)), wanted)
    _, found = gradients(lambda: backpropagate(units, (x,)), wanted)
    assert worst(found, expected) < 1e-10


def test_a_coupling_of_zero_has_no_inverse_and_sends_one_stream() -> None:
    units = make_run(3, g=0.0)
    assert not any(unit.reversible for unit in units)
    x = images(3, 6, 6, 6)
    assert len(backpropagate(units, (x,))) == 1
    assert compare(units, (x,)) < 1e-12


def test_frozen_parameters_get_no_gradient_and_the_rest_keep_theirs() -> None:
    units = make_run(4)
    for p in units[1].parameters():
        p.requires_grad_(False)
    x = images(3, 6, 6, 6)
    wanted = [p for p in parameters_of(units) if p.requires_grad]
    _, expected = gradients(lambda: run_plainly(units, (x,)), wanted)
    _, found = gradients(lambda: backpropagate(units, (x,)), wanted)
    assert worst(found, expected) < 1e-10


def test_no_backward_comes_to_units_below_the_first_that_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    units = make_run(6)
    for unit in units[:4]:
        unit.requires_grad_(False)
    wanted = parameters_of(units[4:])
    expected_out, expected = gradients(lambda: run_plainly(units, (images(3, 6, 6, 6).detach(),)), wanted)
    reversed_units = []
    real = CoupledUnit.reverse
    monkeypatch.setattr(
        CoupledUnit, "reverse", lambda self, *a, **k: (reversed_units.append(self.name), real(self, *a, **k))[1]
    )
    out, found = gradients(lambda: backpropagate(units, (images(3, 6, 6, 6).detach(),)), wanted)
    assert all(torch.equal(a, b) for a, b in zip(out, expected_out, strict=True))
    assert worst(found, expected) < 1e-10
    assert reversed_units == ["block5", "block4"]


def test_a_parameter_shared_by_two_units_gets_the_sum() -> None:
    units = make_run(3)
    units[2] = copy.copy(units[1])
    assert compare_shared(units) < 1e-10


def compare_shared(units) -> float:  # type: ignore[no-untyped-def]
    x = images(3, 6, 6, 6)
    wanted = [x, *dict.fromkeys(parameters_of(units))]
    _, expected = gradients(lambda: run_plainly(units, (x,)), wanted)
    _, found = gradients(lambda: backpropagate(units, (x,)), wanted)
    return worst(found, expected)


def test_double_backward_is_refused_with_a_clear_error() -> None:
    units = make_run(2)
    x = images(3, 6, 6, 6)
    loss = backpropagate(units, (x,))[0].square().sum()
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(loss, x, create_graph=True)


def test_a_weight_changed_before_backward_is_refused() -> None:
    units = make_run(2)
    loss = backpropagate(units, (images(3, 6, 6, 6),))[0].square().sum()
    with torch.no_grad():
        units[0].block[0].weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified in place between forward and backward"):
        loss.backward()


def test_backward_twice_with_retained_graph_gives_the_same() -> None:
    units = make_run(3)
    x = images(3, 6, 6, 6)
    loss = backpropagate(units, (x,))[0].square().sum()
    first = torch.autograd.grad(loss, x, retain_graph=True)[0]
    second = torch.autograd.grad(loss, x)[0]
    assert torch.equal(first, second)


def test_saved_tensor_hooks_see_only_the_ends_of_the_run() -> None:
    units = make_run(6)
    packed: list[int] = []

    def pack(x: torch.Tensor) -> torch.Tensor:
        packed.append(x.numel())
        return x.clone()

    x = images(3, 6, 6, 6)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = backpropagate(units, (x,))
    assert packed == [x.numel()] * 2
    _, expected = gradients(lambda: run_plainly(units, (x,)), [x])
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(y.shape, generator=generator, dtype=torch.float64) for y in out]
    assert worst(torch.autograd.grad(out, [x], weights), expected) < 1e-10


def test_changing_the_coupling_changes_what_has_an_inverse() -> None:
    coupling = Coupling(0.0)
    units = make_run(2)
    for unit in units:
        unit.coupling = coupling
    assert len(list(segments(units))) == 2
    coupling.g = 0.5
    assert len(list(segments(units))) == 1


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(2, 5), st.integers(1, 9), st.integers(1, 6), st.integers(1, 6)),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    channels_last=st.booleans(),
)
def test_remembered_statistics_give_a_batch_norm_the_same_bits(
    shape: tuple[int, int, int, int], dtype: torch.dtype, channels_last: bool
) -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(shape[1]).to(dtype)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    x = (3 * torch.randn(shape, dtype=dtype) + 1).requires_grad_()
    if channels_last:
        x = x.detach().to(memory_format=torch.channels_last).requires_grad_()
    wanted = [x, norm.weight, norm.bias]
    with RememberStatistics() as remembered:
        expected = norm(x.detach())
    with UseStatistics(remembered.statistics):
        found = norm(x)
    assert torch.equal(found, expected)
    weights = torch.randn_like(expected)
    again = torch.autograd.grad(norm(x), wanted, weights)
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(found, wanted, weights), again, strict=True))
    assert int(norm.num_batches_tracked) == 3  # this test calls it three times; frozen_statistics is another's subject


@pytest.mark.parametrize("reconstruct", [True, False])
def test_hooks_of_a_parameter_run_once_for_its_gradient(reconstruct: bool) -> None:
    units, x = make_run(3), torch.randn(2, 6, 5, 5, dtype=torch.float64)
    hooked = units[1].block[0].weight
    found = []
    for factor in (1.0, 0.5):
        handle = hooked.register_hook(lambda g, factor=factor: g * factor)
        out = backpropagate(units, (x,), reconstruct=reconstruct)
        found.append(torch.autograd.grad(out[0].sin().sum(), parameters_of(units)))
        handle.remove()
    for p, whole, other in zip(parameters_of(units), *found, strict=True):
        assert torch.allclose(other, 0.5 * whole if p is hooked else whole)


def test_several_gradients_at_once_are_refused_with_a_clear_error() -> None:
    units, x = make_run(2), torch.randn(2, 6, 5, 5, dtype=torch.float64, requires_grad=True)
    out = backpropagate(units, (x,))[0]
    with pytest.raises(RuntimeError, match=r"one gradient at a time.*set_memory\('plain'\)"):
        torch.autograd.grad(out, x, torch.ones(3, *out.shape, dtype=out.dtype), is_grads_batched=True)


def test_where_nobody_goes_backward_or_operations_are_looked_at_units_run_as_they_are() -> None:
    units, x = make_run(2), torch.randn(2, 6, 5, 5, dtype=torch.float64)
    expected = run_plainly(units, (x,))[0]
    with torch.no_grad():
        assert torch.equal(backpropagate(units, (x,))[0], expected)

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(unit.block for unit in units)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return backpropagate(units, (x,))[0]

    found = torch.export.export(Chain().eval(), (x,)).module()(x)
    assert torch.equal(found, backpropagate(units, (x,))[0])
