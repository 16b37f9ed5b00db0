"""A step of one's own loop as a graph, on the stand-in for CUDA's."""

import copy
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.optim import Lion
from torch import Tensor, nn

import petra_zoo  # noqa: F401 - registers the models
from petra_zoo.errors import UserError
from petra_zoo.petra import GraphedStep
from tests.petra.fake_graph import FakeGraph


def loop(graphed: bool, sizes: list[int], rates: list[float]) -> list[Any]:
    """Losses and, at the end, weights of a loop whose learning rate moves."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))
    optimizer = torch.optim.SGD(model.parameters(), 0.5, momentum=0.9, fused=True)

    def step(x: Tensor, y: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    run = GraphedStep(step, model, optimizer, make_graph=FakeGraph) if graphed else step
    losses = []
    for size, rate in zip(sizes, rates, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        losses.append(run(torch.randn(size, 3), torch.randint(0, 4, (size,))))
    return [losses, model.state_dict()]


def test_it_computes_what_the_loop_does() -> None:
    sizes, rates = [6] * 8 + [4] + [6] * 3, [0.5] * 6 + [0.25] * 4 + [0.125] * 2
    losses, state = loop(True, sizes, rates)
    expected, plain = loop(False, sizes, rates)
    assert losses == expected
    assert all(torch.equal(state[name], x) for name, x in plain.items())


def test_a_replay_is_no_call_until_the_weights_have_moved() -> None:
    model, calls = nn.Linear(3, 2), []
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def step(x: Tensor) -> Tensor:
        calls.append(len(x))
        return model(x).sum().detach()

    run = GraphedStep(step, model, optimizer, make_graph=FakeGraph)
    data = torch.randn(6, 5, 3)
    for x in data:
        run(x)
    assert len(calls) == 4
    model.weight.data = copy.deepcopy(model.weight.data) + 1
    assert torch.equal(run(data[0]), model(data[0]).sum())
    assert len(calls) == 5
    model.load_state_dict(model.state_dict())
    run(data[0])
    assert len(calls) == 6


def test_a_graph_of_a_form_that_is_not_met_again_makes_way() -> None:
    model, calls = nn.Linear(3, 2), []

    def step(x: Tensor) -> Tensor:
        calls.append(len(x))
        return model(x).sum().detach()

    run = GraphedStep(step, model, make_graph=FakeGraph)
    for size in (5, 5, 5, 2, *[5] * 13):
        run(torch.randn(size, 3))
    count = len(calls)
    run(torch.randn(5, 3))
    assert len(calls) == count


def test_an_update_behind_the_step_finds_the_gradients_of_its_call() -> None:
    found = []
    for graphed in (True, False):
        torch.manual_seed(0)
        model, calls = nn.Linear(3, 2), []
        optimizer = Lion(model.parameters(), 0.1)

        def step(x: Tensor, model: nn.Module = model, calls: list[int] = calls) -> Tensor:
            calls.append(len(x))
            model.zero_grad()
            loss = model(x).square().sum()
            loss.backward()
            return loss.detach()

        run = GraphedStep(step, model, make_graph=FakeGraph) if graphed else step
        losses = []
        for size in (5, 5, 5, 5, 5, 3, 5, 5):
            losses.append(run(torch.randn(size, 3)))
            optimizer.step()
            optimizer.zero_grad()
        assert len(calls) == (5 if graphed else 8)
        found.append(losses)
    assert found[0] == found[1]


def test_what_cannot_be_captured_is_told() -> None:
    model = nn.Linear(3, 2)

    def reads(x: Tensor) -> Tensor:
        loss = model(x).sum()
        assert loss.item() < 1e9
        return loss

    run = GraphedStep(reads, model, make_graph=FakeGraph)
    for _ in range(2):
        run(torch.randn(5, 3))
    with pytest.raises(UserError, match="_local_scalar_dense reads a value"):
        run(torch.randn(5, 3))
    with pytest.raises(UserError, match="the update of Lion cannot be captured"):
        GraphedStep(reads, model, Lion(model.parameters()), make_graph=FakeGraph)


@pytest.mark.parametrize(
    ("drop_path", "memory"), [(0.0, "reversible"), pytest.param(0.5, "plain", marks=pytest.mark.slow)]
)
def test_a_reversible_network_can_be_captured_where_its_backward_repeats_no_random_numbers(
    drop_path: float, memory: str
) -> None:
    model = timm.create_model("petra_revnet_tiny", num_classes=4, drop_path_rate=drop_path).train()
    model.set_memory(memory)

    def step(x: Tensor) -> Tensor:
        model.zero_grad()
        loss = model(x).square().sum()
        loss.backward()
        return loss

    run, x = GraphedStep(step, model, make_graph=FakeGraph), torch.randn(2, 3, 8, 8)
    for _ in range(5):
        found = run(x)
    assert torch.isfinite(found)
    if not drop_path:
        assert torch.equal(found, step(x).detach())


def test_random_numbers_that_have_to_be_repeated_are_refused() -> None:
    model = timm.create_model("petra_revnet_tiny", num_classes=4, drop_path_rate=0.5).train()
    run = GraphedStep(lambda x: model(x).sum(), model, make_graph=FakeGraph)
    x = torch.randn(2, 3, 8, 8)
    for _ in range(2):
        run(x)
    with pytest.raises(UserError, match="repeat random numbers"):
        run(x)


def test_on_the_cpu_it_is_the_step_itself() -> None:
    run = GraphedStep(lambda x: x * 2, nn.Linear(1, 1))
    assert [float(run(torch.tensor(float(n)))) for n in range(6)] == [2.0 * n for n in range(6)]
