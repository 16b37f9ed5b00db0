"""What a pipeline trains: parameters frozen, unfrozen and written into between its ticks, and hooks on them."""

from collections.abc import Callable

import pytest
import torch
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn

from petra_zoo.errors import UserError
from petra_zoo.petra import Optimization, Pipeline
from petra_zoo.reversible import CoupledUnit, FunctionUnit, Unit

METHODS = ("petra", "dsp", "delayed", "backprop", "reversible")


class Chain(nn.Module):
    """Two lines around four coupled branches that are modules themselves; `spare` is part of a unit that ignores it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.spare = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(2, 2)
        self.branches = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x))

    def units(self) -> list[Unit]:
        return [
            FunctionUnit("first", lambda x: (self.first(x),), {"first": self.first, "spare": self.spare}),
            *(
                CoupledUnit(f"branch{i}", f, branch=f, activate=torch.tanh, coupling=lambda: 1.0, starts=i == 0)
                for i, f in enumerate(self.branches)
            ),
            FunctionUnit("last", lambda b, a: (self.last(b + a),), {"last": self.last}),
        ]


def sgd(named: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for _, p in named], 0.05, momentum=0.9)


def step(pipeline: Pipeline, times: int) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(times):
        pipeline.step(torch.randn(4, 4, generator=generator), torch.randint(3, (4,), generator=generator))


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def test_every_branch_that_is_a_module_is_trained(method: str) -> None:
    net = Chain()
    before = [p.detach().clone() for p in net.branches.parameters()]
    step(pipeline := Pipeline(net, [2, 2, 2], method=method, optimization=Optimization(sgd)), 8)
    pipeline.drain()
    assert not any(torch.equal(x, p) for x, p in zip(before, net.branches.parameters(), strict=True))


@pytest.mark.parametrize("which", ["first", "branches.1", "last"])
def test_a_parameter_that_is_frozen_between_ticks_stays(method: str, which: str) -> None:
    net = Chain()
    step(pipeline := Pipeline(net, [2, 2, 2], method=method, optimization=Optimization(sgd)), 7)
    part = net.get_submodule(which).requires_grad_(False)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    step(pipeline, 7)
    frozen = {f"{which}.{name}" for name, _ in part.named_parameters()}
    moved = {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}
    assert moved == before.keys() - frozen - {"spare.weight", "spare.bias"}


def test_a_parameter_that_is_unfrozen_between_ticks_is_refused(method: str) -> None:
    net = Chain()
    net.branches[1].requires_grad_(False)
    step(pipeline := Pipeline(net, [2, 2, 2], method=method, optimization=Optimization(sgd)), 3)
    net.branches[1].requires_grad_(True)
    with pytest.raises(UserError, match=r"block\.0\.weight of branch1 was frozen.*build the pipeline anew"):
        step(pipeline, 1)


def test_hooks_of_parameters_run_once_for_each_gradient(method: str) -> None:
    factors = []
    for factor in (1.0, 0.5):
        net = Chain()
        for p in (net.first.weight, net.branches[2][0].weight, net.last.weight):
            p.register_hook(lambda g, factor=factor: g * factor)
        step(pipeline := Pipeline(net, [2, 2, 2], method=method, optimization=Optimization()), 6)
        pipeline.drain()
        factors.append([p.grad for p in net.parameters()])
    for (name, _), x, y in zip(net.named_parameters(), *factors, strict=True):
        hooked = name in ("first.weight", "branches.2.0.weight", "last.weight")
        assert x is None or torch.allclose(y, (0.5 if hooked else 1.0) * x), name


@pytest.mark.parametrize("ticks", range(4, 9))
def test_what_is_written_into_weights_within_a_window_is_what_the_next_forward_uses(method: str, ticks: int) -> None:
    net = Chain()
    pipeline = Pipeline(net, [3, 3], method=method, optimization=Optimization(sgd, accumulation_steps=4))
    step(pipeline, ticks)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(0.5)
    assert_forwards_use(net, pipeline)


@pytest.mark.parametrize("ticks", range(4, 9))
def test_predicted_weights_go_by_the_rate_of_their_tick(ticks: int) -> None:
    net = Chain()
    optimization = Optimization(sgd, accumulation_steps=4, weight_prediction="backward")
    pipeline = Pipeline(net, [3, 3], method="delayed", optimization=optimization)
    step(pipeline, ticks)
    for stage in pipeline.stages:
        assert stage.optimizer
        stage.optimizer.param_groups[0]["lr"] = 0.0  # nothing will move
    assert_forwards_use(net, pipeline)


def assert_forwards_use(net: Chain, pipeline: Pipeline) -> None:
    """The first stage's next message is what the network's units give now."""
    images = torch.randn(4, 4, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected: tuple[Tensor, ...] = (images,)
        for unit in net.units()[:3]:
            expected = unit(*expected)
    sent: list[Tensor] = []
    forward: Callable[..., object] = pipeline.stages[1].forward
    vars(pipeline.stages[1])["forward"] = lambda up: (sent.extend(up.streams), forward(up))[1]
    last = pipeline.stages[1].forward_backward
    vars(pipeline.stages[1])["forward_backward"] = lambda up: (sent.extend(up.streams), last(up))[1]
    pipeline.step(images, torch.zeros(4, dtype=torch.long))
    step(pipeline, 1)
    assert any(torch.equal(x, expected[0]) for x in sent)


@pytest.mark.parametrize("method", ["petra", "backprop", "reversible"])
def test_a_stage_without_any_gradient_updates_nothing(method: str) -> None:
    net = Chain()
    net.first.requires_grad_(False)
    before = net.spare.weight.detach().clone()
    step(Pipeline(net, [1, 5], method=method, optimization=Optimization(sgd, accumulation_steps=2)), 6)
    assert torch.equal(net.spare.weight, before)


def test_a_pipeline_ticks_in_float64_by_default() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        step(Pipeline(Chain(), [3, 3], optimization=Optimization(sgd)), 4)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (lambda optimizer: CosineLRScheduler(optimizer, t_initial=10), "counts epochs.*t_in_epochs=False"),
        (torch.optim.lr_scheduler.ReduceLROnPlateau, "goes by a metric"),
    ],
)
def test_a_schedule_that_does_not_go_by_updates_is_refused(schedule: Callable[..., object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Pipeline(Chain(), [3, 3], optimization=Optimization(sgd, schedule))
