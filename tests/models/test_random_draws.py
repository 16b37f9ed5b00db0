"""What draws random numbers is replayed, wherever it is: gradients are those of the plain path."""

from collections.abc import Callable
from functools import reduce
from types import MethodType

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from petra_zoo.models import PetraRevNet
from petra_zoo.models.coupled_block import CoupledBasicBlock
from petra_zoo.models.memory_modes import Memory
from petra_zoo.reversible import CoupledUnit, FunctionUnit, Unit, backpropagate, units_of
from tests.models.networks import images, tiny

RATES = {"drop_rate": 0.5, "drop_path_rate": 0.5, "drop_block_rate": 0.3}


def dropping(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *args: F.dropout(function(*args), 0.5)


def gradients(model: nn.Module, memory: Memory) -> list[Tensor]:
    model.set_memory(memory)
    model.zero_grad()
    torch.manual_seed(0)
    model(images(2, 16).double()).square().sum().backward()
    return [p.grad.clone() for p in model.parameters()]


def check(model: nn.Module) -> None:
    model.double().train()
    for plain, reversible in zip(gradients(model, "plain"), gradients(model, "reversible"), strict=True):
        assert torch.allclose(plain, reversible, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("rates", [{name: rate} for name, rate in RATES.items()] + [RATES])
def test_rates(rates: dict[str, float]) -> None:
    check(tiny(**rates))


def test_paper_network() -> None:
    check(timm.create_model("petra_revnet18_paper_cifar", num_classes=10, drop_rate=0.5))


@pytest.mark.parametrize(
    ("owner", "name"),
    [(nn.Conv2d, "forward"), (nn.Conv2d, "_conv_forward"), (CoupledBasicBlock, "branch"), (F, "conv2d")],
)
def test_what_somebody_has_replaced(monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> None:
    monkeypatch.setattr(owner, name, dropping(getattr(owner, name)))
    check(tiny())


@pytest.mark.parametrize("change", ["forward", "method", "branch", "module"])
def test_what_somebody_has_put_into_a_block(change: str) -> None:
    model: PetraRevNet = tiny()
    block = model.layer1[1]
    if change == "forward":
        block.conv1.forward = dropping(block.conv1.forward)
    elif change == "method":
        block.conv1.forward = MethodType(dropping(nn.Conv2d.forward), block.conv1)
    elif change == "branch":
        block.branch = MethodType(dropping(type(block).branch), block)
    else:
        block.act1 = nn.RReLU()
    check(model)


def conv_with_foreign_method() -> Unit:
    conv = nn.Conv2d(4, 4, 1)
    branch = MethodType(dropping(nn.Conv2d.forward), conv)
    return CoupledUnit("method", conv, branch=branch, activate=F.relu, coupling=lambda: 1.0)


def function_with_dropout() -> Unit:
    conv = nn.Conv2d(4, 4, 1)
    return FunctionUnit("function", lambda b, a: (F.dropout(conv(b)), a), {"conv": conv})


def extended_after_its_first_use() -> Unit:
    block = nn.Sequential(nn.Conv2d(4, 4, 1))
    unit = CoupledUnit("extended", block, branch=block, activate=F.relu, coupling=lambda: 1.0)
    _ = unit.state
    block.append(nn.Dropout())
    return unit


@pytest.mark.parametrize("make", [conv_with_foreign_method, function_with_dropout, extended_after_its_first_use])
def test_units_on_their_own(make: Callable[[], Unit]) -> None:
    unit = make().double()
    streams = tuple(torch.randn(2, 4, 3, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    wanted = [*streams, *unit.parameters()]
    found = []
    for run in (unit, lambda *x: backpropagate([unit], x)):
        torch.manual_seed(0)
        loss = sum(x.square().sum() for x in run(*streams))
        found.append(torch.autograd.grad(loss, wanted))
    for plain, reversible in zip(*found, strict=True):
        assert torch.allclose(plain, reversible, atol=1e-10)


def test_an_activation_that_draws_in_front_of_a_block_with_two_ways() -> None:
    model = tiny(act_layer=nn.RReLU).double().train()
    parameters, x = list(model.parameters()), images(2, 16).double()
    found = []
    for run in (backpropagate, lambda units, streams: reduce(lambda s, unit: unit(*s), units, streams)):
        torch.manual_seed(0)
        (logits,) = run(units_of(model), (x,))
        found.append(torch.autograd.grad(logits.square().sum(), parameters))
    for ours, expected in zip(*found, strict=True):
        assert torch.allclose(ours, expected, rtol=1e-6, atol=1e-8)
