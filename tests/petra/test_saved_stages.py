"""The state of a pipeline by stages: the same bytes from any number of processes, and back into any number."""

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.optim import create_optimizer_v2
from torch import Tensor
from torch.utils._pytree import tree_leaves

from petra_zoo.checkpoints.packing import from_safetensors, to_safetensors
from petra_zoo.checkpoints.pipeline_files import from_files, to_files
from petra_zoo.checkpoints.store import Store
from petra_zoo.petra import METHODS, Pipeline, Wire, World
from petra_zoo.petra.optimization import load_optimizer, optimizer_state
from petra_zoo.petra.pipeline_state import stages_to_read
from tests.checkpoints.test_store import manifest
from tests.petra.processes import own_world, run_processes
from tests.petra.test_pipeline import batches, make_model, make_pipeline, sgd
from tests.petra.test_processes import adamw, differences

Case = tuple[str, dict[str, Any], bool]  # method, options of the pipeline, channels_last
CASES: list[Case] = [
    *((method, {"accumulation_steps": 3, "clip_grad": 1.0}, False) for method in METHODS),
    ("petra", {"optimizer": adamw, "autocast": torch.bfloat16}, True),
    ("delayed", {"weight_prediction": "head", "optimizer": sgd(0.01)}, True),
]
SAVED_BEHIND, IMAGES = 5, 4


def feed(channels_last: bool) -> list[tuple[Tensor, Tensor]]:
    """The first micro-batch behind the save is smaller, as at the end of an epoch."""
    found = batches(9, IMAGES, torch.float32)
    found[SAVED_BEHIND] = (found[SAVED_BEHIND][0][:3], found[SAVED_BEHIND][1][:3])
    order = torch.channels_last if channels_last else torch.contiguous_format
    return [(x.to(memory_format=order), y) for x, y in found]


def pipeline_of(world: World | None, case: Case) -> Pipeline:
    method, options, channels_last = case
    model = make_model(torch.float32, drop_rate=0.1, drop_path_rate=0.2, coupling=[1.0, 0.5, 0.0, 1.0])
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    world = world or World()
    if world.device.type == "meta":
        model = model.to(world.device)
    world = replace(world, wire=Wire(torch.bfloat16, torch.bfloat16 if channels_last else None))
    return make_pipeline(model, 4, method=method, world=world, **options)


def run(pipeline: Pipeline, data: list[tuple[Tensor, Tensor]], drain: bool = False) -> dict[str, Any]:
    outputs = [pipeline.step(*batch) if pipeline.world.first else pipeline.step() for batch in data]
    if drain:
        outputs += pipeline.drain()
        pipeline.links.finish()
    whole = pipeline.whole_model()
    return {
        "losses": [output.loss for output in outputs if output.loss is not None],
        "labels": [output.labels for output in outputs if output.labels is not None],
        "logits": [output.logits for output in outputs if output.logits is not None],
        "state": None if whole is None else whole.state_dict(),
    }


def saved(pipeline: Pipeline) -> dict[str, bytes]:
    files = to_files(pipeline.state_dict(), with_clock=pipeline.world.last)
    return {name: to_safetensors(state) for name, state in files.items()}


def load(pipeline: Pipeline, files: Mapping[str, bytes], folder: Path) -> None:
    store = Store(folder / f"rank{pipeline.world.rank}")
    store.begin(1)
    checkpoint = store.publish(manifest(1), {name: store.write(1, name, content) for name, content in files.items()})
    own, senders = stages_to_read(pipeline.layout, pipeline.world.rank)
    pipeline.load_state_dict(from_files(checkpoint, 0, own, senders)[0], images=IMAGES)


def save_and_continue(world: World | None, case: Case) -> tuple[dict[str, bytes], dict[str, Any]]:
    pipeline, data = pipeline_of(world, case), feed(case[2])
    run(pipeline, data[:SAVED_BEHIND])
    files = saved(pipeline)
    return files, run(pipeline, data[SAVED_BEHIND:], drain=True)


def resume(world: World | None, case: Case, files: Mapping[str, bytes], folder: Path) -> tuple[bool, dict[str, Any]]:
    """Whether a save right behind the load gives the same files; and what comes of going on."""
    pipeline = pipeline_of(world, case)
    load(pipeline, files, folder)
    again = saved(pipeline)
    same = all(again[name] == files[name] for name in again)
    return same, run(pipeline, feed(case[2])[SAVED_BEHIND:], drain=True)


def in_a_rank(cases: list[Case], alone: list[dict[str, bytes]], folder: Path) -> list[Any]:
    """Saves, and goes on; in a fresh pipeline, goes on from what one process has saved."""
    world, found = own_world(), []
    for i, (case, files) in enumerate(zip(cases, alone, strict=True)):
        found.append((save_and_continue(world, case), resume(world, case, files, folder / str(i))))
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join([case[0], *case[1]]))
def test_a_fresh_pipeline_goes_on_to_the_bit_from_files(case: Case, tmp_path: Path) -> None:
    files, expected = save_and_continue(None, case)
    same, found = resume(None, case, files, tmp_path)
    assert same
    assert differences(found, expected) == []


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("ranks", [2, 4])
def test_any_number_of_processes_saves_the_same_files_and_goes_on_from_them(ranks: int, tmp_path: Path) -> None:
    cases = CASES
    alone = [save_and_continue(None, case) for case in cases]
    by_rank = run_processes(ranks, tmp_path, in_a_rank, cases, [files for files, _ in alone], tmp_path)
    for i, (case, (files, expected)) in enumerate(zip(cases, alone, strict=True)):
        together = {name: content for results in by_rank for name, content in results[i][0][0].items()}
        assert sorted(together) == sorted(files), case
        assert [name for name in files if together[name] != files[name]] == [], case
        assert all(results[i][1][0] for results in by_rank), case
        undisturbed, resumed = by_rank[-1][i][0][1], by_rank[-1][i][1][1]
        assert differences(undisturbed, expected) == [], case
        assert differences(resumed, expected) == [], case


def test_saving_changes_nothing() -> None:
    case = CASES[0]
    pipeline, control = pipeline_of(None, case), pipeline_of(None, case)
    for batch in feed(False):
        pipeline.step(*batch)
        first = saved(pipeline)
        assert saved(pipeline) == first
        control.step(*batch)
    assert differences(run(pipeline, [], drain=True), run(control, [], drain=True)) == []


def test_an_optimizers_state_keeps_its_type(tmp_path: Path) -> None:
    pipeline = make_pipeline(make_model(torch.float32), 1)
    pipeline.step(*batches(1, dtype=torch.float32)[0])
    (optimizer,) = [stage.optimizer for stage in pipeline.stages]
    assert optimizer
    for kept in optimizer.state.values():
        kept["momentum_buffer"] = kept["momentum_buffer"].bfloat16()
    (tmp_path / "x").write_bytes(to_safetensors({"x": optimizer.state_dict()}))
    state = copy.deepcopy(pipeline.state_dict())
    state["stages"][0]["optimizer"] = from_safetensors(tmp_path / "x")["x"]
    pipeline.load_state_dict(state)
    assert {kept["momentum_buffer"].dtype for kept in optimizer.state.values()} == {torch.bfloat16}


def test_the_state_of_an_optimizer_around_another_is_restored() -> None:
    def made() -> tuple[torch.nn.Parameter, torch.optim.Optimizer]:
        p = torch.nn.Parameter(torch.ones(3))
        p.grad = torch.ones(3)
        return p, create_optimizer_v2([p], "lookahead_sgd", lr=0.1, momentum=0.9)

    (p, first), (q, second) = made(), made()
    first.step()
    load_optimizer(second, copy.deepcopy(optimizer_state(first)))
    with torch.no_grad():
        q.copy_(p)
    for _ in range(7):  # beyond a step of the slow weights
        first.step()
        second.step()
    assert torch.equal(p, q)


@pytest.mark.parametrize("case", CASES[:3], ids=lambda case: case[0])
def test_what_is_in_flight_goes_on_where_the_pipeline_computes(case: Case, tmp_path: Path) -> None:
    """Files give all of it on the CPU; the meta device stands for a GPU."""
    pipeline = pipeline_of(None, case)
    run(pipeline, feed(False)[:SAVED_BEHIND])
    files, elsewhere = saved(pipeline), pipeline_of(World(device=torch.device("meta")), case)
    load(elsewhere, files, tmp_path)
    state = elsewhere.state_dict()
    kept = [(own["gradients"], own["in_flight"]) for own in state["stages"].values()]
    tensors = [x for x in tree_leaves([kept, state["sent"]]) if isinstance(x, Tensor)]
    assert len(tensors) > 10
    assert {x.device.type for x in tensors} == {"meta"}


def test_an_optimizer_goes_on_by_the_ways_of_its_own_device() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer = torch.optim.NAdam([p])
    optimizer.step()
    state = copy.deepcopy(optimizer_state(optimizer))
    state["param_groups"][0]["capturable"] = True  # as it is on a GPU
    load_optimizer(optimizer, state)
    optimizer.step()
    assert optimizer.param_groups[0]["capturable"] is False
