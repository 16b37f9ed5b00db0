"""Compiled branches: one graph for the forward and its reversal, in the memory of the reversible mode."""

import copy
import pickle
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from petra_zoo.errors import UserError
from petra_zoo.models import ReversibleSequential
from petra_zoo.petra import Optimization, Pipeline
from petra_zoo.reversible import BranchBlock, CompileOptions, CoupledUnit, Unit, backpropagate, compile_branches
from tests.models.test_petra_revvit import small
from tests.models.transformers import transformer
from tests.petra.fake_graph import FakeGraph

# Only hidden by torch while it compiles, so that warnings which are errors see it.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")

GRAPHS: list[torch.fx.GraphModule] = []


def counting(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
    """A backend that leaves operations as they are, and counts how often something is compiled."""
    GRAPHS.append(graph)
    return graph


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    """No graph of another test, and an error where torch.compile would quietly go on without compiling."""
    torch.compiler.reset()
    GRAPHS.clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, suppress_errors=False):
        yield
    torch.compiler.reset()


class Block(BranchBlock):
    def __init__(self, width: int = 4, drop: float = 0.0) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.drop = nn.Dropout(drop)

    def branch(self, h: Tensor) -> Tensor:
        return self.drop(self.bn(self.conv(h)))

    def unit(self, starts: bool) -> Unit:
        return CoupledUnit(
            "block", self, branch=self.run_branch, activate=torch.relu, coupling=lambda: 1.0, starts=starts
        )


def run(blocks: Sequence[Block], x: Tensor, reversible: bool) -> tuple[list[Tensor], Tensor]:
    """Gradients of a step through a run of blocks, and its output."""
    units = [block.unit(i == 0) for i, block in enumerate(blocks)]
    torch.manual_seed(3)
    streams: tuple[Tensor, ...] = (x.clone().requires_grad_(),)
    if reversible:
        streams = backpropagate(units, streams)
    else:
        for unit in units:
            streams = unit(*streams)
    sum(y.square().sum() for y in streams).backward()
    return [p.grad for block in blocks for p in block.parameters()], streams[0].detach()


def blocks_of(count: int, compiled: bool, **kwargs: Any) -> list[Block]:
    torch.manual_seed(1)
    blocks = [Block(**kwargs) for _ in range(count)]
    if compiled:
        compile_branches(nn.ModuleList(blocks), CompileOptions(backend=counting))  # type: ignore[arg-type]
    return blocks


X = torch.randn(5, 4, 6, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.slow
def test_forward_and_reversal_of_all_blocks_of_a_structure_run_one_graph() -> None:
    blocks, plain = blocks_of(3, True), blocks_of(3, False)
    for step in range(2):
        found, y = run(blocks, X, reversible=True)
        expected, y_plain = run(plain, X, reversible=True)
        assert torch.equal(y, y_plain)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        assert len(GRAPHS) == 1, step
    for block, other in zip(blocks, plain, strict=True):  # in the forward, once
        for name, buffer in block.named_buffers():
            assert torch.equal(buffer, other.get_buffer(name)), name


@pytest.mark.slow
def test_a_dozen_widths_are_compiled_and_none_falls_back() -> None:
    for width in range(1, 13):
        block = Block(width)
        compile_branches(block, CompileOptions(backend=counting))  # type: ignore[arg-type]
        run([block], torch.randn(2, width, 3, 3), reversible=True)
    assert len(GRAPHS) == 12


@pytest.mark.slow
def test_what_a_compiled_branch_draws_is_drawn_again_in_its_reversal() -> None:
    blocks = [block.double() for block in blocks_of(3, False, drop=0.5)]
    compile_branches(nn.ModuleList(blocks), CompileOptions(backend="aot_eager"))
    found, y = run(blocks, X.double(), reversible=True)
    for block in blocks:
        block.zero_grad()
    expected, y_plain = run(blocks, X.double(), reversible=False)
    assert torch.equal(y, y_plain)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_reversible_and_plain_steps_of_a_network_compute_the_same_bits(backend: str) -> None:
    torch.manual_seed(0)
    reversible = timm.create_model("petra_revnet_tiny", exact=True).train()
    for m in reversible.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.0)
    plain = copy.deepcopy(reversible)
    plain.set_memory("plain")
    images, found = torch.randn(4, 3, 8, 8), []
    for model in (reversible, plain):
        model.compile_branches(backend)
        logits = model(images)
        logits.square().sum().backward()
        found.append([logits, *model.buffers(), *(p.grad for p in model.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    assert torch.equal(found[0][0], found[1][0])


@pytest.mark.slow
def test_nothing_that_a_compiled_forward_has_saved_outlives_it() -> None:
    alive = [0]

    class Saved:
        def __init__(self, x: Tensor) -> None:
            self.x = x
            alive[0] += x.nbytes

        def __del__(self) -> None:
            alive[0] -= self.x.nbytes

    kept = []
    for compiled in (True, False):
        units = [block.unit(i == 0) for i, block in enumerate(blocks_of(4, compiled))]
        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.x):
            streams = backpropagate(units, (X.clone().requires_grad_(),))
        kept.append(alive[0])
        sum(y.sum() for y in streams).backward()
        del streams
        assert alive[0] == 0
    assert kept[0] == kept[1]
    assert len(GRAPHS) == 1


@pytest.mark.slow
def test_a_pipeline_trains_with_compiled_branches() -> None:
    losses = []
    for compiled in (True, False):
        torch.manual_seed(0)
        model = timm.create_model("petra_revnet_tiny", num_classes=10).train()
        if compiled:
            model.compile_branches(backend="aot_eager")
        sgd = Optimization(lambda named: torch.optim.SGD([p for _, p in named], 0.05))
        pipeline = Pipeline(model, 4, optimization=sgd)
        generator = torch.Generator().manual_seed(2)
        outputs = [
            pipeline.step(torch.randn(8, 3, 8, 8, generator=generator), torch.randint(10, (8,), generator=generator))
            for _ in range(10)
        ]
        losses.append([float(output.loss) for output in outputs if output.loss is not None])
    assert len(losses[0]) == 7
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.slow
def test_captured_ticks_of_compiled_branches_compute_the_bits_of_uncaptured_ones() -> None:
    found = []
    for graphs in (FakeGraph, "off"):
        torch.manual_seed(0)
        model = timm.create_model("petra_revnet_tiny", num_classes=10).train()
        model.compile_branches(backend="aot_eager")
        sgd = Optimization(lambda named: torch.optim.SGD([p for _, p in named], 0.05, fused=True))
        pipeline = Pipeline(model, 2, optimization=sgd, graphs=graphs)  # type: ignore[arg-type]
        generator = torch.Generator().manual_seed(2)
        outputs = [
            pipeline.step(torch.randn(8, 3, 8, 8, generator=generator), torch.randint(10, (8,), generator=generator))
            for _ in range(12)
        ]
        found.append([float(output.loss) for output in outputs if output.loss is not None])
    assert pipeline.captured is None
    assert found[0] == found[1]


def blocks_network(kind: str) -> Any:
    """With so many blocks that torch.compile would give up on one function for each."""
    if kind == "two streams":
        return small(torch.float64, depth=10).train()
    return transformer(kind, depth=10, coupling=0.5, gain=1.5, units="branch" if kind == "beit" else "auto").double()


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", ["vit", "eva02", "mixed rope", "beit", "two streams"])
def test_blocks_of_a_transformer_share_the_graphs_of_their_branches(kind: str) -> None:
    model, found = blocks_network(kind).train(), []
    x = torch.randn(2, 3, 8 if kind == "two streams" else 16, 8 if kind == "two streams" else 16, dtype=torch.float64)
    for compiled, memory in ((False, "reversible"), (True, "reversible"), (True, "plain")):
        if compiled:
            model.compile_branches(counting)
        model.set_memory(memory)
        model.zero_grad()
        logits = model(x)
        logits.square().sum().backward()
        found.append([logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
        assert len(GRAPHS) <= (4 if compiled else 0)
    for other in found[1:]:
        # Not to the bit: the compiler takes attention with a bias apart into products of its own.
        torch.testing.assert_close(other[0], found[0][0], rtol=1e-12, atol=1e-12)
        for one, two in zip(found[0], other, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_what_a_compiled_block_takes_beside_its_stream_gets_its_gradient() -> None:
    torch.manual_seed(0)
    layers = [nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).double() for _ in range(3)]
    chain, found = ReversibleSequential(layers, coupling=0.5, gain=1.5).train(), []
    for compiled in (False, True):
        if compiled:
            compile_branches(chain, CompileOptions(backend="aot_eager"))
        mask = torch.zeros(5, 5, dtype=torch.float64, requires_grad=True)
        chain(torch.ones(2, 5, 8, dtype=torch.float64).cumsum(1), src_mask=mask).square().sum().backward()
        found.append(mask.grad)
    torch.testing.assert_close(found[0], found[1])
    assert float(found[0].abs().max()) > 0


def test_branches_in_parts_are_not_compiled() -> None:
    with pytest.raises(UserError, match="a branch in parts cannot be compiled: unset chunks"):
        small(chunks=2).compile_branches()


@pytest.mark.gpu
@pytest.mark.timeout(300)
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_on_a_gpu_forward_and_reversal_compute_the_same_bits(autocast: torch.dtype | None) -> None:
    torch._dynamo.utils.counters.clear()
    block, x = Block(16).cuda(), torch.randn(8, 16, 12, 12, device="cuda")
    compile_branches(block, CompileOptions())
    unit, shift = block.unit(True), torch.randn_like(x)
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast is not None):
        with torch.no_grad():
            forward = unit.branch(x) + shift
        with unit.untouched(), torch.enable_grad():
            again = unit.branch((x * 1.0).requires_grad_()) + shift
    assert torch.equal(forward, again)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_in_evaluation_and_under_hooks_a_branch_runs_as_operations() -> None:
    (block,) = blocks_of(1, True)
    with torch.no_grad():
        block.eval()
        assert torch.equal(block.run_branch(X), block.branch(X))
        block.train()
        block.conv.register_forward_hook(lambda *_: None)
        assert torch.equal(block.run_branch(X), block.branch(X))
    assert not GRAPHS


def test_copies_and_pickles_are_compiled_as_well() -> None:
    (block,) = blocks_of(1, False)
    compile_branches(block, CompileOptions(backend="aot_eager"))
    assert copy.deepcopy(block).compiled == pickle.loads(pickle.dumps(block)).compiled == CompileOptions("aot_eager")


def test_a_compiled_network_can_still_be_scripted() -> None:
    model = timm.create_model("petra_revnet_tiny", num_classes=3).eval()
    model.compile_branches()
    images = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(torch.jit.script(model)(images), model(images))


def test_a_compilers_advice_on_float32_products_is_no_error_in_tests() -> None:
    """What inductor says on a GPU, in some versions as a warning: it took three tests on a GPU down."""
    warnings.warn("TensorFloat32 tensor cores for float32 matrix multiplication available", UserWarning, stacklevel=1)


def test_what_cannot_be_compiled_is_refused_in_one_line() -> None:
    with pytest.raises(UserError, match=r"replays CUDA graphs of its own.*max-autotune-no-cudagraphs"):
        timm.create_model("petra_revnet_tiny").compile_branches(mode="reduce-overhead")
    with pytest.raises(UserError, match="Linear has no branch that can be compiled"):
        compile_branches(nn.Linear(1, 1), CompileOptions())
