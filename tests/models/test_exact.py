"""Exact inversion in whole networks: the same function on every path, what it stores, and what it refuses."""

import copy
from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from petra_zoo.errors import UserError
from petra_zoo.models import PetraRevNet
from petra_zoo.models.reversible_sequential import ReversibleSequential
from petra_zoo.reversible import LiveBytes
from petra_zoo.training.coupling_schedule import CouplingSchedule
from tests.models.networks import images, small, tiny
from tests.reversible.blocks import worst

HALF = {"exact": {"exact": True}, "fixed16": {"streams": "fixed16"}}


def in_float32(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


def under_autocast(model: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return model(x)


@pytest.mark.parametrize("run", [in_float32, under_autocast])
@pytest.mark.parametrize("kind", HALF)
def test_the_forward_has_the_same_bits_on_every_path(run: Callable, kind: str) -> None:
    def make() -> PetraRevNet:
        return small(coupling=0.5, **HALF[kind]).train()

    x = images(4, 16)
    plain, hooked, model = make(), make(), make()
    plain.set_memory("plain")
    hooked.layer1[1].register_forward_hook(lambda *_: None)
    expected = run(plain, x)
    assert torch.equal(run(make(), x), expected)
    assert torch.equal(run(hooked, x), expected)
    with torch.no_grad():
        assert torch.equal(run(model, x), expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:`isinstance:UserWarning")
@pytest.mark.parametrize("kind", HALF)
@pytest.mark.parametrize("transform", ["exported", "traced", "scripted", "compiled", "symbolic"])
def test_a_transformed_network_has_the_eager_bits(transform: str, kind: str) -> None:
    model = small(coupling=0.25, **HALF[kind]).eval()
    x = images(2, 16)
    expected = model(x)
    other = copy.deepcopy(model)
    torch.compiler.reset()
    ways: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
        "exported": lambda: torch.export.export(other, (x,)).module(),
        "traced": lambda: torch.jit.trace(other, x),
        "scripted": lambda: torch.jit.script(other),
        "compiled": lambda: torch.compile(other, backend="eager", fullgraph=True),
        "symbolic": lambda: torch.fx.symbolic_trace(other),
    }
    assert torch.equal(ways[transform]()(x), expected)


@pytest.mark.parametrize("g", [1.0, 0.5, 1 / 16])
def test_reversible_and_plain_gradients_agree(g: float) -> None:
    found = []
    for memory in ("reversible", "plain"):
        model = tiny(coupling=g, exact=True, exact_bits=30, drop_path_rate=0.2).double().train()
        model.set_memory(memory)
        torch.manual_seed(1)
        F.cross_entropy(model(images(4, 16).double()), torch.arange(4)).backward()
        found.append([p.grad for p in model.parameters()])
    assert worst(*found) < 1e-10


def test_under_autocast_an_exact_small_coupling_has_the_plain_gradient() -> None:
    """Without the bits that are kept, half of it would be noise."""
    found = []
    for memory in ("reversible", "plain"):
        torch.manual_seed(0)
        blocks = [nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16)) for _ in range(12)]
        network = ReversibleSequential(map(_Residual, blocks), coupling=1 / 8, gain=9 / 8, exact=True)
        network.memory = memory
        with torch.autocast("cpu", torch.bfloat16):
            y = network(torch.randn(4, 6, 16, generator=torch.Generator().manual_seed(1)))
        y.square().mean().backward()
        found.append([p.grad for p in network.parameters()])
    assert worst(*found) < 1e-5


class _Residual(nn.Module):
    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


@pytest.mark.parametrize(("bits", "kept"), [(0, 0), (1, 1), (2, 2), (3, 4), (4, 4), (8, 8)])
def test_what_a_unit_stores_is_the_bits_that_are_dropped(bits: int, kept: int) -> None:
    x = torch.randn(4, 8, 32)

    def stored(depth: int) -> int:
        blocks = [_Residual(nn.Linear(32, 32)) for _ in range(depth)]
        network = ReversibleSequential(blocks, coupling=2.0**-bits, exact=True)
        with LiveBytes([x, *network.parameters(), *network.buffers()]) as memory:
            y = network(x)
            torch.empty(0)
            now = memory.now
        del y
        return now

    checksum = 4  # bytes, whatever the size of the streams
    assert (stored(10) - stored(4)) / 6 == x.nbytes * kept / 32 + checksum


@pytest.mark.parametrize(
    "make", [lambda: tiny(coupling=0.3125, exact=True), lambda: tiny(exact=True).set_coupling(0.3125)]
)
def test_a_coupling_that_is_no_power_of_two_is_refused_with_the_nearest(make: Callable) -> None:
    with pytest.raises(UserError, match=r"1, 1/2, 1/4, \.\.\. and 0, not 0\.3125: the nearest is 0\.25$"):
        make()


def test_a_checkpoint_with_such_a_coupling_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"layer1\.coupling: exact inversion takes .* the nearest is 0\.25"):
        tiny(exact=True).load_state_dict(tiny(coupling=0.3125).state_dict())


def test_couplings_that_move_are_refused() -> None:
    model = timm.create_model("petra_revnet_tiny", exact=True)
    with pytest.raises(UserError, match=r"coupling_epochs=3: .* exact=False"):
        CouplingSchedule(model, 3)
