"""Activations and blocks that somebody has put into a reversible ResNet: the gradients are plain's, or it is told."""

import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from petra_zoo.errors import UserError
from petra_zoo.models import PetraRevNet
from petra_zoo.models.coupled_block import CoupledBasicBlock
from petra_zoo.models.reversible_sequential import ReversibleSequential
from petra_zoo.petra import Pipeline
from petra_zoo.reversible import kept_graphs
from tests.models.networks import images, tiny


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + 0.3 * torch.randn_like(x))


class ScaledByChance(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x * torch.rand((), dtype=x.dtype))


class Shifted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + 0.125) / 2.0


class Softened(CoupledBasicBlock):
    def activate(self, b: Tensor) -> Tensor:
        return F.silu(b)


def network(**kwargs: Any) -> PetraRevNet:
    return tiny(**kwargs).double().train()


def with_activation(act: type[nn.Module], **kwargs: Any) -> PetraRevNet:
    model = network(**kwargs)
    for layer in model.coupled_layers():
        for block in layer:
            block.act2 = act()
    return model


def gradients(model: nn.Module, memory: str) -> dict[str, Tensor]:
    model.set_memory(memory)
    model.zero_grad()
    torch.manual_seed(5)
    model(images().double()).square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def off_by(model: nn.Module) -> float:
    plain, found = gradients(model, "plain"), gradients(model, "reversible")
    assert plain.keys() == found.keys()
    return max(float((x - found[name]).norm() / (x.norm() + 1e-9)) for name, x in plain.items())


@pytest.mark.parametrize("g", [1.0, 0.5])
@pytest.mark.parametrize("act", [Shifted, nn.SiLU, nn.Hardswish])
def test_gradients_are_plains_whatever_the_activation(act: type[nn.Module], g: float) -> None:
    assert off_by(with_activation(act, coupling=g)) < 1e-8


@pytest.mark.parametrize("act", [Noisy, ScaledByChance])
def test_an_activation_that_draws_is_evaluated_once_on_the_way_back(act: type[nn.Module]) -> None:
    model = network()
    model.layer1[0].act2 = act()  # its run starts with it: no merge draws another time
    assert off_by(model) < 1e-8


@pytest.mark.parametrize("g", [1.0, 0.5])
def test_a_block_with_another_activation_than_its_modules_is_not_taken_for_relu(g: float) -> None:
    model = network(coupling=g)
    for layer in model.coupled_layers():
        for block in layer:
            block.__class__ = Softened
    assert off_by(model) < 1e-8


def test_a_patched_activation_is_not_taken_for_relu() -> None:
    model = network()
    for layer in model.coupled_layers():
        for block in layer:
            vars(block.act2)["forward"] = F.silu
    assert off_by(model) < 1e-8


def test_an_activation_in_place_is_made_to_copy() -> None:
    expected = gradients(network(), "reversible")
    model = network()
    for layer in model.coupled_layers():
        for block in layer:
            block.act2 = nn.ReLU(inplace=True)
    for memory in ("reversible", "plain"):
        found = gradients(model, memory)
        assert all(torch.allclose(x, expected[name]) for name, x in found.items())


def test_an_activation_with_parameters_is_refused_where_units_are_needed() -> None:
    model = network()
    model.layer1[0].act2 = nn.PReLU(dtype=torch.float64)
    message = r"layer1\.0: an activation with parameters \(PReLU\).*set_memory\('plain'\)"
    for call in (lambda: model(images().double()), model.units, lambda: Pipeline(model, [6, 6])):
        with pytest.raises(UserError, match=message):
            call()
    gradients(model, "plain")
    assert model.layer1[0].act2.weight.grad is not None


class WritesInPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.sigmoid(self.linear(x))
        h.mul_(2.0)
        return x + h


@pytest.mark.parametrize("memory", ["plain", "reversible"])
def test_a_branch_that_damages_what_it_needs_is_told(memory: Any) -> None:
    chain = ReversibleSequential(nn.ModuleList(WritesInPlace() for _ in range(4)))
    chain.memory = memory
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        chain(torch.randn(2, 6)).sum().backward()


class ReadsAnothers(nn.Module):
    def __init__(self, shared: nn.Linear) -> None:
        super().__init__()
        self.own, self.held = nn.Linear(6, 6), [shared]  # a list hides it from the block

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.own(x) + self.held[0](x))


def test_a_parameter_that_a_block_reads_and_does_not_hold_is_told() -> None:
    shared = nn.Linear(6, 6)
    chain = ReversibleSequential(nn.ModuleList(ReadsAnothers(shared) for _ in range(4)))
    with pytest.raises(RuntimeError, match=r"reads a parameter of shape \[6, 6\] that none of its modules holds"):
        chain(torch.randn(2, 6)).sum().backward()
    chain.memory = "plain"
    chain(torch.randn(2, 6)).sum().backward()
    assert shared.weight.grad is not None


def test_what_is_frozen_behind_a_forward_gets_no_gradient() -> None:
    expected, model = gradients(network(), "reversible"), network()
    torch.manual_seed(5)
    loss = model(images().double()).square().mean()
    model.layer2.requires_grad_(False)
    loss.backward()
    for name, p in model.named_parameters():
        assert (p.grad is None) == name.startswith("layer2."), name
        assert p.grad is None or torch.allclose(p.grad, expected[name])


def test_threads_that_share_a_network_count_it_one_after_the_other() -> None:
    model, failed = network(norm_layer="groupnorm1"), []
    kept_graphs._known.clear()

    def step() -> None:
        try:
            model(images().double())
        except RuntimeError as error:
            failed.append(error)

    threads = [threading.Thread(target=step) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
