"""timm's optimizers, one per stage: what a stage does is nobody else's business, random numbers included."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.optim import create_optimizer_v2
from torch import Tensor

from petra_zoo.petra import Pipeline, World
from tests.petra import chain
from tests.petra.chain import data
from tests.petra.processes import own_world, run_processes
from tests.petra.test_pipeline import run

OPTIMIZERS = ["muon", "nadamw", "adan", "kron", "adamw", "lion"]
pytestmark = [
    pytest.mark.filterwarnings("ignore:It is highly recommended to have 'opt_einsum'"),
    # PSGD compiles a function for every shape, which takes longer than all these tests.
    pytest.mark.usefixtures("eager"),
]


@pytest.fixture
def eager() -> Any:
    with torch.compiler.set_stance("force_eager"):
        yield


def short_chain() -> chain.Chain:
    return chain.Chain(depth=1)


def make_short_pipeline(model: Any, **kwargs: Any) -> Pipeline:
    return chain.make_chain_pipeline(model, [1, 1, 1], **kwargs)


def timms(opt: str) -> Any:
    return lambda named: create_optimizer_v2([p for _, p in named], opt=opt, lr=0.02, weight_decay=0.01)


@pytest.mark.parametrize("opt", OPTIMIZERS)
def test_a_stage_alone_makes_the_updates_that_it_makes_among_others(opt: str) -> None:
    """As a process would that has no other stage: from the gradients alone, whatever the generator was left at."""
    together = short_chain()
    pipeline = make_short_pipeline(together, optimizer=timms(opt), accumulation_steps=2)
    gradients: list[list[Tensor]] = [[] for _ in pipeline.stages]
    for stage in pipeline.stages:
        (p,) = stage.own_parameters()
        stage.optimizer.register_step_pre_hook(  # type: ignore[union-attr]
            lambda *_, p=p, found=gradients[stage.index]: found.append(p.grad.clone())
        )
    run(pipeline, data(8))
    for j, found in enumerate(gradients):
        alone = make_short_pipeline(short_chain(), optimizer=timms(opt)).stages[j]
        (p,) = alone.own_parameters()
        for gradient in found:
            torch.rand(j + 1)
            p.grad, alone.gradients_in_window = gradient, 1
            alone.update()
        assert len(found) == 4
        assert torch.equal(p, pipeline.stages[j].own_parameters()[0]), j


@pytest.mark.parametrize("opt", OPTIMIZERS)
def test_a_restored_pipeline_continues_to_the_bit(opt: str) -> None:
    feed = data(12)
    straight, first, second = short_chain(), short_chain(), short_chain()
    run(make_short_pipeline(straight, optimizer=timms(opt)), feed)
    stopped = make_short_pipeline(first, optimizer=timms(opt))
    run(stopped, feed[:9], drain=False)
    continued = make_short_pipeline(second, optimizer=timms(opt))
    continued.load_state_dict(copy.deepcopy(stopped.state_dict()))
    run(continued, feed[9:])
    assert all(map(torch.equal, straight.state_dict().values(), second.state_dict().values()))


def test_an_optimizer_that_draws_leaves_the_global_generator_alone() -> None:
    pipeline = make_short_pipeline(short_chain(), optimizer=timms("kron"), accumulation_steps=4)
    before = torch.get_rng_state()
    run(pipeline, data(14))  # the last window is not full: drained
    assert torch.equal(torch.get_rng_state(), before)


def train(opt: str, kind: str, world: World | None = None) -> dict[str, Tensor] | None:
    with torch.compiler.set_stance("force_eager"):
        pipeline = make_short_pipeline(short_chain(), optimizer=timms(opt), weight_prediction=kind, world=world)
        for batch in data(14):
            pipeline.step(*batch) if pipeline.world.first else pipeline.step()
        pipeline.drain()
        pipeline.links.finish()
        whole = pipeline.whole_model()
    return None if whole is None else whole.state_dict()


CASES = [(opt, kind) for opt in [*OPTIMIZERS, "sgd", "nadam"] for kind in ("none", "head", "backward")]


def train_in_a_rank() -> list[Any]:
    world = own_world()
    return [train(*case, world) for case in CASES]


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(300)
def test_processes_compute_the_bits_of_one_process(tmp_path: Path) -> None:
    found = run_processes(2, tmp_path, train_in_a_rank)[-1]
    for case, there in zip(CASES, found, strict=True):
        here = train(*case)
        assert here is not None
        assert all(torch.equal(there[name], x) for name, x in here.items()), case
