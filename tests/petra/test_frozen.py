"""The engine with frozen parameters and frozen batch-norm statistics."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from petra_zoo.petra import METHODS, Pipeline, World
from petra_zoo.training.finetuning import keep_statistics
from tests.petra.processes import own_world, run_processes
from tests.petra.test_pipeline import batches, make_model, make_pipeline, run

BELOW = ("conv1", "bn1", "layer1", "layer2")  # of layer3: the stem and the first 6 blocks, units 0 to 6
FIRST = 7


def freeze(model: nn.Module, parts: tuple[str, ...]) -> None:
    for part in parts:
        model.get_submodule(part).requires_grad_(False)
        keep_statistics(model.get_submodule(part))


def updating(names: set[str]) -> Any:
    """An optimizer that leaves all other parameters as they are."""

    def make(named: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        groups = [{"params": [p], "lr": 0.02 if name in names else 0.0} for name, p in named]
        return torch.optim.SGD(groups, 0.0, momentum=0.9)

    return make


@pytest.mark.parametrize(
    ("method", "stages", "last_stage"),
    [*((method, 3, "graph") for method in METHODS), ("petra", 14, "recompute"), ("petra", 1, "recompute")],
)
def test_the_rest_trains_as_if_the_gradients_below_had_been_computed(method: str, stages: int, last_stage: str) -> None:
    frozen, whole = make_model(drop_path_rate=0.2), make_model(drop_path_rate=0.2)
    freeze(frozen, BELOW)
    for part in BELOW:
        keep_statistics(whole.get_submodule(part))
    names = {name for name, p in frozen.named_parameters() if p.requires_grad}
    before = copy.deepcopy(frozen.state_dict())
    data = batches(5)
    for model in (frozen, whole):
        run(make_pipeline(model, stages, method=method, last_stage=last_stage, optimizer=updating(names)), data)
    found, expected = frozen.state_dict(), whole.state_dict()
    for name, value in before.items():
        torch.testing.assert_close(found[name], expected[name], rtol=1e-12, atol=1e-12, msg=name)
        if name.startswith(BELOW):
            assert torch.equal(found[name], value), name
    assert any(not torch.equal(found[name], before[name]) for name in names)


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_sent_or_kept_below_what_trains(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    freeze(model, BELOW)
    pipeline = make_pipeline(model, 14, method=method)
    backwards = set()
    for j, stage in enumerate(pipeline.stages):
        real = stage._finish_backward
        monkeypatch.setattr(stage, "_finish_backward", lambda *args, j=j, real=real: (backwards.add(j), real(*args))[1])
    for images, labels in batches(4):
        pipeline.step(images, labels)
        for stage in pipeline.stages[:FIRST]:
            assert not _tensors(stage.in_flight_state())
    pipeline.drain()
    assert backwards == set(range(FIRST, 14))
    assert pipeline.in_flight == 0


@pytest.mark.parametrize("method", METHODS)
def test_frozen_layers_in_the_middle_and_above_pass_gradients_on(method: str) -> None:
    model = make_model()
    freeze(model, ("layer2", "layer4", "fc"))
    before = copy.deepcopy(model.state_dict())
    pipeline = make_pipeline(model, 5, method=method)
    with pipeline.probe() as probe:
        run(pipeline, batches(4))
    changed = {name.split(".")[0] for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"conv1", "bn1", "layer1", "layer3"}
    assert all(torch.isfinite(torch.tensor(m.cosine)) for m in probe.measurements)


def test_probes_measure_only_what_trains() -> None:
    model = make_model()
    freeze(model, BELOW)
    pipeline = make_pipeline(model, 5, optimizer=updating(set()))
    first = next(j for j, owned in enumerate(pipeline.layout.stages) if owned[-1] >= FIRST)
    assert first > 0
    with pipeline.probe() as probe:
        run(pipeline, batches(9))
    assert {m.stage for m in probe.measurements} == set(range(first, 5))
    assert len(probe.measurements) == 9 * (5 - first)
    assert all(m.cosine == pytest.approx(1.0) for m in probe.measurements)  # at fixed parameters
    assert not probe._batches
    assert not probe._inputs


@pytest.mark.parametrize("method", METHODS)
def test_frozen_statistics_are_used_and_never_change(method: str) -> None:
    model = make_model()
    keep_statistics(model)
    before = {name: value.clone() for name, value in model.named_buffers()}
    plain = copy.deepcopy(model).eval()
    pipeline = make_pipeline(model.train(), 4, method=method, optimizer=updating(set()))
    data = batches(3)
    outputs = run(pipeline, data)
    for output, (images, _) in zip(outputs, data, strict=True):
        with torch.no_grad():
            torch.testing.assert_close(output.logits, plain(images))
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())


@pytest.mark.parametrize("coupling", [0.5, 1.0])
def test_with_frozen_statistics_the_reversible_step_is_plain_backpropagation(coupling: float) -> None:
    """Forward and recomputation both use running statistics: else they would differ and nothing would fit."""
    gradients = {}
    for memory in ("plain", "reversible", "recompute"):
        model: Any = make_model(coupling=coupling)
        keep_statistics(model)
        model.train().set_memory(memory)
        ((images, labels),) = batches(1)
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        gradients[memory] = [p.grad for p in model.parameters()]
    for memory in ("reversible", "recompute"):
        for found, expected in zip(gradients[memory], gradients["plain"], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


def _tensors(state: Any) -> list[Tensor]:
    if isinstance(state, Tensor):
        return [state]
    values = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else []
    return [x for value in values for x in _tensors(value)]


def test_a_pipeline_continues_to_the_bit_with_frozen_stages() -> None:
    data = batches(10)
    straight = make_model()
    freeze(straight, BELOW)
    run(make_pipeline(straight, 4), data)
    first, second = make_model(), make_model()
    freeze(first, BELOW)
    freeze(second, BELOW)
    stopped = make_pipeline(first, 4)
    run(stopped, data[:5], drain=False)
    continued: Pipeline = make_pipeline(second, 4)
    continued.load_state_dict(copy.deepcopy(stopped.state_dict()))
    run(continued, data[5:])
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in straight.state_dict().items())


def train_frozen(world: World | None = None) -> list[Any]:
    """With 14 stages, of which the lowest 7 are frozen; gives losses and, on the last rank, the weights."""
    found = []
    for method in ("petra", "delayed", "reversible"):
        model = make_model(torch.float32)
        freeze(model, BELOW)
        pipeline = make_pipeline(model, 14, method=method, world=world)
        feed = batches(6, dtype=torch.float32)
        outputs = [pipeline.step(*batch) if pipeline.world.first else pipeline.step() for batch in feed]
        outputs += pipeline.drain()
        pipeline.links.finish()
        whole = pipeline.whole_model()
        losses = [output.loss for output in outputs if output.loss is not None]
        found.append((losses, None if whole is None else whole.state_dict()))
    return found


def train_frozen_in_a_rank() -> list[Any]:
    return train_frozen(own_world())


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(180)
def test_ranks_without_anything_to_train_change_no_bit(tmp_path: Path) -> None:
    alone = train_frozen()
    last = run_processes(3, tmp_path, train_frozen_in_a_rank)[-1]
    for (losses, weights), (expected, whole) in zip(last, alone, strict=True):
        assert len(losses) == len(expected) == 6
        assert all(map(torch.equal, losses, expected))
        assert weights.keys() == whole.keys()
        assert [name for name, value in whole.items() if not torch.equal(value, weights[name])] == []
