"""What a recomputation sees and leaves behind: the forward's tensors, and no trace in any buffer."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.parametrizations import spectral_norm

from petra_zoo.petra import Pipeline
from petra_zoo.reversible import CoupledUnit, FunctionUnit, Unit, backpropagate
from tests.reversible.blocks import Coupling, branch, worst


class Chain(nn.Module):
    """A unit without an inverse in front of a run of two; `plain` stores activations."""

    def __init__(self, *blocks: nn.Module, g: float = 1.0) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks).double()
        self.g, self.plain = g, False

    def units(self) -> list[Unit]:
        first, *run = self.blocks
        units: list[Unit] = [FunctionUnit("first", lambda x: (x + first(x),), {"first": first})]
        for i, block in enumerate(run):
            units.append(
                CoupledUnit(f"run{i}", block, branch=block, activate=F.relu, coupling=Coupling(self.g), starts=i == 0)
            )
        units.append(FunctionUnit("head", lambda *s: (s[0].mean((2, 3)),), {}))
        return units

    def forward(self, x: Tensor) -> Tensor:
        if self.plain:
            streams: tuple[Tensor, ...] = (x,)
            for unit in self.units():
                streams = unit(*streams)
            return streams[0]
        return backpropagate(self.units(), (x,))[0]


def chain(make: Callable[[], nn.Module] = lambda: branch(4), plain: bool = False) -> Chain:
    torch.manual_seed(0)
    model = Chain(*(make() for _ in range(3)))
    model.plain = plain
    return model


def x(seed: int = 1) -> Tensor:
    return torch.randn(3, 4, 5, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def other_weights(model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        name: p.detach() + 0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
        for name, p in model.named_parameters()
    }


def gradients_of_call(model: Chain, which: str) -> list[Tensor]:
    """Gradients of leaves from which the call's weights are made."""
    leaves = {name: w.requires_grad_() for name, w in other_weights(model).items()}
    if which == "some":
        leaves = {name: w for name, w in leaves.items() if "blocks.1" in name}
    weights = {name: w * 2 for name, w in leaves.items()} if which == "non-leaf" else dict(leaves)
    if which == "frozen":
        for name in [name for name in leaves if "blocks.2" in name]:
            weights[name] = leaves.pop(name).detach()
    loss = functional_call(model, weights, (x(),)).square().sum()
    loss.backward()
    return [w.grad for w in leaves.values()]


@pytest.mark.parametrize("which", ["all", "some", "non-leaf", "frozen"])
def test_functional_call_gets_the_gradients_of_its_own_weights(which: str) -> None:
    found, expected = gradients_of_call(chain(), which), gradients_of_call(chain(plain=True), which)
    assert worst(found, expected) < 1e-10


def test_buffers_handed_to_functional_call_are_those_of_the_recomputation() -> None:
    found = []
    for plain in (False, True):
        model = chain(plain=plain).eval()  # eval mode: running statistics have a part in the function
        buffers = {name: b + 0.3 for name, b in model.named_buffers() if b.is_floating_point()}
        functional_call(model, buffers, (x(),)).square().sum().backward()
        found.append([p.grad for p in model.parameters()])
    assert worst(*found) < 1e-10


def test_weights_exchanged_through_data_are_seen_as_plain_backpropagation_sees_them() -> None:
    found = []
    for plain in (False, True):
        model = chain(plain=plain)
        y = model(x())
        for p in model.parameters():
            p.data = p.data * 1.5
        y.square().sum().backward()
        found.append([p.grad for p in model.parameters()])
    assert all(torch.isfinite(g).all() for g in found[0])


@pytest.mark.parametrize("frozen", [False, True])
def test_a_parameter_modified_before_backward_is_refused_by_name(frozen: bool) -> None:
    model = chain()
    model.blocks[1][0].weight.requires_grad_(not frozen)
    loss = model(x()).sum()
    with torch.no_grad():
        model.blocks[1][0].weight.mul_(2)
    with pytest.raises(RuntimeError, match=r"block\.0\.weight\) was modified in place between forward and backward"):
        loss.backward()


def test_running_statistics_in_use_that_change_before_backward_are_refused() -> None:
    model = chain().eval()
    loss = model(x()).sum()
    model.train()(x(2))
    with pytest.raises(RuntimeError, match="num_batches_tracked"):
        loss.backward()


class Counter(nn.Module):
    """Scales by how often it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls.clone()


class OwnNorm(nn.Module):
    """A norm with statistics of its own that it also reads in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.ones((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.detach().square().mean()  # another tensor in the buffer's place
        return x / self.mean.sqrt()


class RenormedBatchNorm(nn.BatchNorm2d):
    """A batch norm with a forward of its own, which reads the running statistics in train mode too."""

    def forward(self, x: Tensor) -> Tensor:
        out = (x - self.running_mean[:, None, None]) * torch.rsqrt(self.running_var + self.eps)[:, None, None]
        with torch.no_grad():
            self.running_mean.lerp_(x.mean((0, 2, 3)), 0.1)
        return out


STATEFUL: dict[str, Callable[[], nn.Module]] = {
    "spectral norm": lambda: nn.Sequential(spectral_norm(nn.Conv2d(4, 4, 3, padding=1)), nn.SiLU()),
    "counter": lambda: nn.Sequential(nn.Conv2d(4, 4, 1), Counter(), nn.SiLU()),
    "norm of one's own": lambda: nn.Sequential(nn.Conv2d(4, 4, 1), OwnNorm(), nn.SiLU()),
    "subclass of batch norm": lambda: nn.Sequential(nn.Conv2d(4, 4, 1), RenormedBatchNorm(4, affine=False), nn.SiLU()),
    "batch norm": lambda: branch(4),
    "instance norm": lambda: nn.Sequential(
        nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.InstanceNorm2d(4, track_running_stats=True)
    ),
}


@pytest.mark.parametrize("kind", STATEFUL)
def test_backward_changes_no_buffer_and_gives_the_plain_gradient(kind: str) -> None:
    model, plain = chain(STATEFUL[kind]), chain(STATEFUL[kind], plain=True)
    for seed in (1, 2, 3):  # state that has moved on
        y, expected = model(x(seed)), plain(x(seed))
        after_forward = [b.clone() for b in model.buffers()]
        y.square().sum().backward()
        expected.square().sum().backward()
        assert all(torch.equal(a, b) for a, b in zip(model.buffers(), after_forward, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(model.buffers(), plain.buffers(), strict=True))
    gradients = [[p.grad for p in m.parameters()] for m in (model, plain)]
    assert worst(*gradients) < 1e-10


@pytest.mark.parametrize("kind", STATEFUL)
@pytest.mark.parametrize("method", ["petra", "dsp", "delayed", "reversible", "backprop"])
def test_under_the_engine_state_advances_once_per_micro_batch(kind: str, method: str) -> None:
    model, plain = chain(STATEFUL[kind]).train(), chain(STATEFUL[kind], plain=True).train()
    pipeline = Pipeline(model, [1, 1, 2], method=method)
    for seed in range(4):
        pipeline.step(x(seed), torch.arange(3))
        with torch.no_grad():
            plain(x(seed))
    pipeline.drain()
    for mine, expected in zip(model.buffers(), plain.buffers(), strict=True):
        assert torch.allclose(mine.double(), expected.double(), rtol=1e-12)
