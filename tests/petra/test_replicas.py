"""Two dimensions: replicas of a pipeline that average their gradients."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist

import petra_zoo  # noqa: F401 - registers the models
from petra_zoo.petra import World
from petra_zoo.petra.messages import Down
from petra_zoo.petra.stage import Stage
from tests.petra.processes import own_world, run_processes
from tests.petra.test_pipeline import batches, make_pipeline, sgd

pytestmark = [pytest.mark.dist, pytest.mark.timeout(180)]
REPLICAS = 2


def make_model(norm: str) -> Any:
    torch.manual_seed(0)
    return timm.create_model("petra_revnet_tiny", num_classes=10, norm_layer=norm).double().train()


def train(world: World | None, norm: str, data: list[Any]) -> list[torch.Tensor]:
    model = make_model(norm)
    pipeline = make_pipeline(model, 2, optimizer=sgd(0.02), world=world)
    for batch in data:
        pipeline.step(*batch) if pipeline.world.first else pipeline.step()
    pipeline.drain()
    pipeline.links.finish()
    whole = pipeline.whole_model()
    return [] if whole is None else [p.detach() for p in whole.parameters()]


def train_a_replica(norms: list[str]) -> list[list[torch.Tensor]]:
    world = own_world(REPLICAS)
    mine = batches(10)[world.replica :: REPLICAS]
    return [train(world, norm, mine) for norm in norms]


def accumulate(norm: str) -> list[torch.Tensor]:
    """What D replicas compute, in one process: the mean of D gradients, each of a micro-batch of its own."""
    models = [make_model(norm) for _ in range(REPLICAS)]
    pipelines = [make_pipeline(model, 2, optimizer=None) for model in models]
    shared = make_model(norm)
    optimizers = []
    for j in range(2):
        own = {id(p) for group in pipelines[0].stages[j].parameters for p in group}
        pairs = list(zip(models[0].parameters(), shared.parameters(), strict=True))
        optimizers.append(sgd(0.02)([(str(i), p) for i, (q, p) in enumerate(pairs) if id(q) in own]))
    feeds = [batches(10)[replica::REPLICAS] for replica in range(REPLICAS)]
    for tick in range(5 + 2):
        for pipeline, feed in zip(pipelines, feeds, strict=True):
            for stage in pipeline.stages:
                stage.gradients_in_window = 0  # without an optimizer its update leaves the gradients alone
            if tick < 5:
                pipeline.step(*feed[tick])
            elif pipeline.in_flight:
                pipeline._run_tick(None, feeding=False)
        for p, *others in zip(shared.parameters(), *(model.parameters() for model in models), strict=True):
            found = [q.grad for q in others if q.grad is not None]
            p.grad = torch.stack(found).mean(0) if found else None
        for optimizer in optimizers:
            optimizer.step()
        with torch.no_grad():
            for p, *others in zip(shared.parameters(), *(model.parameters() for model in models), strict=True):
                for q in others:
                    q.copy_(p)
                    q.grad = None
    return [p.detach() for p in shared.parameters()]


@pytest.mark.slow
def test_replicas_equal_a_larger_batch_or_ghost_batches(tmp_path: Path) -> None:
    """Without statistics over the batch: D times the batch in one pipeline. With local ones: ghost batches."""
    found = run_processes(2 * REPLICAS, tmp_path, train_a_replica, ["groupnorm1", "batchnorm2d"])
    without_statistics, with_local_ones = found[1]
    pairs = zip(batches(10)[::2], batches(10)[1::2], strict=True)
    larger = [tuple(torch.cat(both) for both in zip(a, b, strict=True)) for a, b in pairs]
    for got, expected in (
        (without_statistics, train(None, "groupnorm1", larger)),
        (with_local_ones, accumulate("batchnorm2d")),
    ):
        error = max(float((x - y).norm() / y.norm().clamp_min(1e-12)) for x, y in zip(got, expected, strict=True))
        assert error < 1e-9
    for first, second in zip(found[1], found[3], strict=True):
        assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True)), "replicas stay equal"


def what_a_tick_does() -> list[str]:
    """Of a process with four stages of a replica: backwards, and averages that begin, in the order of a full tick."""
    events: list[str] = []
    begin, backward = dist.all_reduce, Stage.backward

    def all_reduce(*args: Any, **kwargs: Any) -> Any:
        events.append("average")
        return begin(*args, **kwargs)

    def go_backward(stage: Stage, down: Down) -> Down:
        events.append(f"backward {stage.index}")
        return backward(stage, down)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(dist, "all_reduce", all_reduce)
        patched.setattr(Stage, "backward", go_backward)
        torch.manual_seed(0)
        world = own_world(REPLICAS)
        pipeline = make_pipeline(make_model("batchnorm2d"), 4, optimizer=sgd(0.02), world=world)
        for batch in batches(16)[world.replica :: REPLICAS]:
            events.clear()
            pipeline.step(*batch)
    return events


def test_a_stages_average_over_replicas_is_under_way_while_the_stages_below_go_backward(tmp_path: Path) -> None:
    expected = ["average", "backward 2", "average", "backward 1", "average", "backward 0", "average"]
    assert run_processes(REPLICAS, tmp_path, what_a_tick_does) == [expected] * REPLICAS
