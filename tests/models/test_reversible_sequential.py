"""The container of any chain of blocks: the same function and gradients, without stored activations."""

import copy
import pickle

import pytest
import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.func import functional_call

from petra_zoo.errors import UserError
from petra_zoo.models.branches import branches_of
from petra_zoo.models.reversible_sequential import ReversibleSequential
from petra_zoo.reversible import LiveBytes, Streams
from tests.models.chain_blocks import TOKENS, WIDTH, Biased, tokens, transformer
from tests.reversible.blocks import worst

COUPLINGS = [(0.0, 1.0), (0.25, 1.25), (0.5, 1.0), (0.5, 1.5), (1.0, 1.0), (1.0, 2.0)]


def pair(**kwargs: object) -> tuple[ReversibleSequential, ReversibleSequential]:
    """A container and a copy of it that stores activations."""
    chain = ReversibleSequential(transformer(drop_path=0.3, proj_drop=0.1, attn_drop=0.1), **kwargs).train()
    plain = copy.deepcopy(chain)
    plain.memory = "plain"
    return chain, plain


def step(chain: nn.Module, *shared: object, seed: int = 0, **named: object) -> tuple[Tensor, list[Tensor | None]]:
    """The output of a training step, and the gradients of its input and of the parameters."""
    x = tokens().requires_grad_()
    torch.manual_seed(seed)
    y = chain(x, *shared, **named)
    y.square().sum().backward()
    return y.detach(), [x.grad, *(p.grad for p in chain.parameters())]


@pytest.mark.parametrize("units", ["block", "branch"])
@pytest.mark.parametrize(("g", "s"), COUPLINGS)
def test_gradients_are_those_of_plain_backpropagation(g: float, s: float, units: str) -> None:
    found = [step(chain) for chain in pair(coupling=g, gain=s, units=units)]
    assert torch.equal(found[0][0], found[1][0])
    assert worst(found[0][1], found[1][1]) < 1e-9


def test_blocks_are_coupled_by_the_formula() -> None:
    chain = ReversibleSequential(transformer(3), coupling=0.25, gain=1.5).eval().requires_grad_(False)
    x = tokens()
    first = chain[0](x)
    second = 1.5 * chain[1](first) + (1 - 0.25 - 1.5) * first + 0.25 * x
    third = 1.5 * chain[2](second) + (1 - 0.25 - 1.5) * second + 0.25 * first
    assert worst([chain(x)], [(third + 0.25 * second) / 1.25]) < 1e-12


def test_branches_are_coupled_by_the_formula() -> None:
    chain = ReversibleSequential(transformer(1), coupling=0.5, gain=1.5, units="branch").eval().requires_grad_(False)
    (_, attention), (_, mlp) = branches_of(chain[0])
    x = tokens()
    first = x + attention(x)
    second = 1.5 * mlp(first) + 0.5 * first + 0.5 * x
    assert worst([chain(x)], [(second + 0.5 * first) / 1.5]) < 1e-12


@pytest.mark.parametrize("mode", ["train", "eval", "autocast"])
@pytest.mark.parametrize("units", ["block", "branch"])
def test_at_coupling_0_the_bits_are_those_of_a_sequential(units: str, mode: str) -> None:
    blocks = [block.float() for block in transformer(drop_path=0.3)]
    chain = ReversibleSequential(blocks, coupling=0.0, units=units).train(mode == "train")
    x, found = tokens().float().requires_grad_(), []
    for module in (chain, nn.Sequential(*blocks)):
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mode == "autocast"):
            found.append(module(x))
    assert found[0].dtype == found[1].dtype
    assert torch.equal(*found)


@pytest.mark.parametrize("g", [0.0, 0.5, 1.0])
def test_what_blocks_take_beside_the_stream_gets_its_gradients(g: float) -> None:
    found = []
    for memory in ("reversible", "plain"):
        torch.manual_seed(0)
        chain = ReversibleSequential([Biased() for _ in range(4)], coupling=g).train()
        chain.memory = memory
        given = [torch.randn(TOKENS, WIDTH, dtype=torch.float64, requires_grad=True) for _ in range(3)]
        bias, sin, cos = (x * 2 for x in given)  # they have a graph of their own
        y, gradients = step(chain, bias, rope=(sin, cos), negate=True)
        found.append([y, *gradients, *(x.grad for x in given)])
    assert worst(*found) < 1e-10


def test_a_bias_that_is_modified_before_backward_is_refused() -> None:
    chain = ReversibleSequential([Biased(), Biased()], coupling=0.5).train()
    bias = torch.zeros(WIDTH, dtype=torch.float64)
    y = chain(tokens(), bias).sum()
    bias.add_(1.0)
    with pytest.raises(RuntimeError, match="modified in place between forward and backward"):
        y.backward()


@pytest.mark.parametrize("memory", ["reversible", "recompute", "plain"])
def test_features_are_the_merged_streams_of_a_slice(memory: str) -> None:
    chain = ReversibleSequential(transformer(), coupling=0.5).train()
    chain.memory = memory
    found = chain.features(tokens(), (2, 0))
    expected = [chain[:1](tokens()), chain[:3](tokens()), chain(tokens())]
    assert all(map(torch.equal, found, expected))
    assert len(found) == 3


def test_gradients_through_features_are_those_of_plain_backpropagation() -> None:
    found = []
    for chain in pair(coupling=0.5, anchor_every=2):
        x = tokens().requires_grad_()
        torch.manual_seed(0)
        sum(y.square().sum() for y in chain.features(x, (0, 1))).backward()
        found.append([x.grad, *(p.grad for p in chain.parameters())])
    assert worst(*found) < 1e-9


@pytest.mark.parametrize("units", ["block", "branch"])
@pytest.mark.parametrize("g", [0.0, 0.5, 1.0])
def test_units_give_what_the_container_gives(g: float, units: str) -> None:
    chain = ReversibleSequential(transformer(drop_path=0.3), coupling=g, gain=1.5, units=units).train()
    torch.manual_seed(0)
    expected = chain(tokens())
    torch.manual_seed(0)
    listed, leave = chain.units("blocks")
    streams: Streams = (chain.enter(tokens()),)
    for unit in listed:
        streams = unit(*streams)
    assert torch.equal(leave(*streams), expected)
    assert [unit.name for unit in listed][:2] == (
        ["blocks.0", "blocks.1"] if units == "block" else ["blocks.0.attn", "blocks.0.mlp"]
    )


def test_units_compute_what_blocks_share_where_they_need_it() -> None:
    torch.manual_seed(0)
    table = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)
    chain = ReversibleSequential([Biased(), Biased()], coupling=0.5).train()
    listed, leave = chain.units("blocks", shared=lambda: (table.weight[0],), reads={"table": table})
    streams: Streams = (chain.enter(tokens()),)
    for unit in listed:
        streams = unit(*streams)
    assert torch.equal(leave(*streams), chain(tokens(), table.weight[0]))
    assert all(any(p is table.weight for p in unit.parameters()) for unit in listed)


def test_a_block_that_changes_the_shape_ends_a_run() -> None:
    found = []
    for memory in ("reversible", "plain"):
        torch.manual_seed(0)
        wide = [nn.Linear(2 * WIDTH, 2 * WIDTH) for _ in range(3)]
        narrow, opening = [nn.Linear(WIDTH, WIDTH) for _ in range(2)], nn.Linear(WIDTH, 2 * WIDTH)
        chain = ReversibleSequential([*narrow, opening, *wide], coupling=0.5, opening=[opening]).double().train()
        chain.memory = memory
        found.append(step(chain)[1])
        x = chain[:2](tokens())
        assert torch.equal(chain(tokens()), chain[3:](opening(x)))
    assert worst(*found) < 1e-10
    assert [step.starts for step in chain.steps()] == [True, False, False, True, False, False]


def test_slices_share_blocks_coupling_and_gain() -> None:
    chain = ReversibleSequential(transformer(), coupling=0.5)
    part = chain[1:3]
    chain.set_coupling(0.25)
    chain.set_gain(1.25)
    assert isinstance(part, ReversibleSequential)
    assert list(part) == [chain[1], chain[2]]
    assert (part.g(), part.gain_now()) == (0.25, 1.25)
    assert list(part._modules) == ["1", "2"]


def test_a_plain_state_dict_gives_the_plain_function() -> None:
    blocks = transformer()
    chain = ReversibleSequential(transformer(), gain=None)
    chain.set_gain(1.5)
    chain.load_state_dict(nn.Sequential(*blocks).state_dict())
    assert (chain.g(), chain.gain_now()) == (0.0, 1.0)
    assert torch.equal(chain.eval()(tokens()), nn.Sequential(*blocks).eval()(tokens()))


def test_coupling_and_gain_are_in_the_state_dict() -> None:
    chain, other = (ReversibleSequential(transformer(2), coupling=None) for _ in range(2))
    chain.set_coupling(0.5)
    chain.set_gain(1.5)
    other.load_state_dict(chain.state_dict())
    assert (other.g(), other.gain_now()) == (0.5, 1.5)


def test_copies_and_pickles_compute_the_same() -> None:
    chain = ReversibleSequential(transformer(2), coupling=0.5, opening=()).train()
    expected = step(chain)[1]
    for other in (copy.deepcopy(chain), pickle.loads(pickle.dumps(chain))):
        other.zero_grad()
        assert all(map(torch.equal, step(other)[1], expected))


def test_a_copy_knows_its_own_opening_block() -> None:
    blocks = [nn.Linear(WIDTH, WIDTH) for _ in range(3)]
    chain = copy.deepcopy(ReversibleSequential(blocks, opening=blocks[:1]))
    assert [step.in_run for step in chain.steps()] == [False, True, True]


def test_weights_handed_to_functional_call_get_the_gradients() -> None:
    found = []
    for chain in pair(coupling=0.5):
        weights = {name: (p.detach() * 1.1).requires_grad_() for name, p in chain.named_parameters()}
        torch.manual_seed(0)
        functional_call(chain, weights, (tokens(),)).square().sum().backward()
        found.append([p.grad for p in weights.values()])
    assert worst(*found) < 1e-9


def test_hooks_see_tensors_with_gradients() -> None:
    chain = ReversibleSequential(transformer(), coupling=0.5).train()
    expected = chain(tokens())
    seen: list[Tensor] = []
    chain[2].register_forward_hook(lambda module, args, output: seen.append(output))
    assert torch.equal(chain(tokens()), expected)
    assert seen[0].requires_grad


def test_a_hook_on_a_block_that_is_not_called_is_refused() -> None:
    chain = ReversibleSequential(transformer(2), units="branch")
    chain[1].register_forward_hook(lambda module, args, output: None)
    with pytest.raises(UserError, match=r"block 1 has a hook, but is not called as a whole"):
        chain(tokens())


def test_unknown_blocks_have_no_branches() -> None:
    with pytest.raises(UserError, match=r"Linear is not known by its branches \(.*Block.* are\)"):
        ReversibleSequential([nn.Linear(3, 3)], units="branch")


@pytest.mark.parametrize("g", [0.0, 0.5])
def test_an_exported_container_computes_the_same(g: float) -> None:
    chain = ReversibleSequential(transformer(2), coupling=g, gain=1.5).eval()
    exported = torch.export.export(chain, (tokens(),)).module()
    assert torch.allclose(exported(tokens()), chain(tokens()), rtol=0, atol=1e-12)


def test_a_compiled_container_computes_the_same() -> None:
    chain = ReversibleSequential([Biased(), Biased()], coupling=0.5, gain=1.5).eval()
    bias = torch.ones(WIDTH, dtype=torch.float64)
    compiled = torch.compile(chain, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(tokens(), bias, negate=True), chain(tokens(), bias, negate=True), rtol=0, atol=1e-12)


def test_a_traced_container_computes_the_same() -> None:
    chain = ReversibleSequential(transformer(2), coupling=0.5, gain=1.5).eval()
    traced = torch.jit.trace(chain, tokens())
    assert torch.allclose(traced(tokens()), chain(tokens()), rtol=0, atol=1e-12)


@pytest.mark.parametrize("units", ["block", "branch"])
def test_what_is_stored_does_not_grow_with_depth(units: str) -> None:
    stored, peaks = [], []
    for depth in (3, 5):
        chain = ReversibleSequential([block.float() for block in transformer(depth)], units=units).to("meta").train()
        for p in chain.parameters():
            p.grad = torch.zeros_like(p)
        x = torch.empty(2**16, TOKENS, WIDTH, device="meta", requires_grad=True)
        with LiveBytes([*chain.parameters(), *chain.buffers(), x]) as memory:
            y = chain(x)
            stored.append(memory.now)
            y.sum().backward()
        peaks.append(memory.peak)
    assert stored[0] == stored[1]
    assert peaks[1] < 1.01 * peaks[0]


def test_gradients_of_what_blocks_share_do_not_grow_with_depth() -> None:
    peaks = []
    for depth in (4, 9):
        chain = ReversibleSequential([Biased() for _ in range(depth)]).to("meta").train()
        x, bias = (
            torch.empty(2**12, TOKENS, WIDTH, device="meta", dtype=torch.float64, requires_grad=True) for _ in range(2)
        )
        with LiveBytes([*chain.parameters(), *chain.buffers(), x, bias]) as memory:
            chain(x, bias).sum().backward()
        peaks.append(memory.peak)
    assert peaks[1] < 1.05 * peaks[0]


def test_exact_streams_are_reconstructed_to_the_bit() -> None:
    chain = ReversibleSequential([block.float() for block in transformer(6)], exact=True, coupling=1.0).train()
    listed, _ = chain.units("blocks")
    streams: Streams = (chain.enter(tokens().float()),)
    before = []
    for unit in listed:
        before.append(streams)
        streams = unit(*streams)
    for unit, expected in zip(reversed(listed), reversed(before), strict=True):
        streams = unit.reverse(streams, (None,) * len(streams), []).inputs
        assert all(map(torch.equal, streams, expected))


def test_drop_path_of_whole_samples_is_replayed() -> None:
    blocks = [nn.Sequential(nn.Linear(WIDTH, WIDTH), DropPath(0.5)).double() for _ in range(3)]
    chain = ReversibleSequential(blocks, coupling=0.5).train()
    found = []
    for memory in ("reversible", "plain"):
        chain.memory = memory
        chain.zero_grad()
        found.append(step(chain)[1])
    assert worst(*found) < 1e-9
