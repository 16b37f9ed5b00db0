"""Units at the end keep their graph as far as that costs no memory, and nothing but recomputation changes."""

import copy
from collections import OrderedDict
from collections.abc import Callable, Sequence

import pytest
import timm
import torch
from torch import Tensor, nn

from petra_zoo.models import PetraRevNet
from petra_zoo.reversible import FunctionUnit, LiveBytes, Streams, Unit, backpropagate, kept_graphs, kept_units
from tests.models.networks import images, tiny
from tests.reversible.blocks import gradients, make_run, parameters_of, run_plainly


def narrowing(shapes: Sequence[tuple[int, int]] = ((16, 2), (16, 1), (16, 1), (8, 2), (4, 2))) -> list[Unit]:
    """A unit without an inverse for each width and stride."""
    units: list[Unit] = []
    below = 3
    for i, (width, stride) in enumerate(shapes):
        layers = nn.Sequential(nn.Conv2d(below, width, 3, stride, 1), nn.BatchNorm2d(width), nn.ReLU())
        units.append(FunctionUnit(f"unit{i}", layered(layers), {"layers": layers}))
        below = width
    return units


def layered(layers: nn.Sequential) -> Callable[[Tensor], Streams]:
    def function(x: Tensor) -> Streams:
        return (layers(x),)

    return function


def peak(units: list[Unit], kept: int) -> int:
    """On the meta device, where nothing is computed; the images are many, so that weights do not count."""
    for unit in units:
        unit.to("meta")
    x = torch.empty(2**10, 3, 32, 32, device="meta")
    with LiveBytes([x]) as memory:
        backpropagate(units, (x,), kept=kept)[0].sum().backward()
    return memory.peak


def test_as_many_are_kept_as_cost_no_memory() -> None:
    kept = kept_units(narrowing(), torch.empty(1, 3, 32, 32))
    assert 0 < kept < 5
    none, found, all_of_them = (peak(narrowing(), n) for n in (0, kept, 5))
    assert found < 1.001 * none < all_of_them


def test_a_network_as_wide_at_its_end_keeps_its_last_unit_alone() -> None:
    assert kept_units(narrowing([(8, 1)] * 5), torch.empty(1, 3, 32, 32)) <= 1


def test_units_that_look_at_values_keep_nothing() -> None:
    units = narrowing()
    units.insert(0, FunctionUnit("looking", lambda x: (x if float(x.sum()) > 0 else -x,), {}))
    assert kept_units(units, torch.empty(1, 3, 32, 32)) == 0


def test_a_network_that_is_trained_at_its_end_alone_counts_what_goes_backward() -> None:
    units = narrowing()
    for p in parameters_of(units[:3]):
        p.requires_grad_(False)
    assert peak(units, kept_units(units, torch.empty(1, 3, 32, 32))) < 1.001 * peak(units, 0)


@pytest.mark.parametrize("kept", [1, 3, 5])
def test_gradients_are_those_of_the_plain_path(kept: int) -> None:
    units = make_run(5, dropout=0.3)
    x = torch.randn(3, 6, 6, 6, dtype=torch.float64, requires_grad=True)
    wanted = [x, *parameters_of(units)]
    found = []
    for run in (run_plainly, lambda *given: backpropagate(*given, kept=kept)):
        torch.manual_seed(0)
        found.append(gradients(lambda run=run: run(units, (x,)), wanted)[1])
    for mine, theirs in zip(*found, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-9, atol=1e-12)


def test_what_a_count_finds_out_it_leaves_no_trace_of() -> None:
    model: PetraRevNet = tiny(drop_rate=0.2).train()
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    kept_units(model.units(), images(2, 24))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(x.device.type == "cpu" and torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_what_a_process_has_counted_before_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_graphs, "_MOST", 2)
    monkeypatch.setattr(kept_graphs, "_known", OrderedDict())
    for size in (8, 12, 16):
        kept_units(narrowing(), torch.empty(1, 3, size, size))
    assert kept_units(narrowing(), torch.empty(1, 3, 32, 32)) > 0
    assert len(kept_graphs._known) == 2


def test_surgery_is_counted_anew() -> None:
    model: PetraRevNet = timm.create_model("petra_revnet_tiny").train()
    x = images(2, 16)
    before = kept_units(model.units(), x)
    model.layer4 = nn.Sequential(nn.Conv2d(32, 512, 3, padding=1), nn.Conv2d(512, 48, 3, padding=1))
    assert 0 < kept_units(model.units(), x) < before


def test_counting_leaves_the_generator_where_it_was() -> None:
    """A drop path that many write by hand draws on the CPU."""

    class Drop(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * (torch.rand(len(x), 1, 1, 1) > 0.3).to(x.device, x.dtype)

    model = tiny().train()
    model.layer4[1].act1 = nn.Sequential(model.layer4[1].act1, Drop())
    torch.manual_seed(3)
    before = torch.get_rng_state()
    kept_graphs._known.clear()
    assert kept_units(model.units(), images()) > 0
    assert torch.equal(torch.get_rng_state(), before)
