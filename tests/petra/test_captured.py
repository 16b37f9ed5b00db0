"""Captured ticks, on the stand-in for a CUDA graph: the same bits, and nothing outlives a change."""

import copy
import logging
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn

from petra_zoo.errors import UserError
from petra_zoo.petra import Layout, Method, Optimization, Output, Pipeline, find_method
from petra_zoo.petra.rates import rates_of
from petra_zoo.petra.stage import Stage
from petra_zoo.reversible import CoupledUnit, FunctionUnit, Streams, Unit
from tests.petra.fake_graph import FakeGraph

Batch = tuple[Tensor, Tensor]
SIZE = (2, 4, 4)


def block() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.Dropout(0.2))


class Small(nn.Module):
    """Two runs of blocks that draw, with a unit without an inverse in between."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.middle, self.head = nn.Conv2d(2, 4, 1), nn.Conv2d(8, 4, 1), nn.Linear(8, 5)
        self.blocks = nn.ModuleList(block() for _ in range(4))
        self.register_buffer("coupling", torch.ones(()))
        self.g = 1.0

    def units(self) -> list[Unit]:
        def coupled(i: int) -> Unit:
            return CoupledUnit(
                f"block{i}",
                self.blocks[i],
                branch=self.blocks[i],
                activate=F.relu,
                coupling=lambda: self.g,
                starts=i % 2 == 0,
            )

        return [
            FunctionUnit("stem", lambda x: (self.stem(x),), {"stem": self.stem}),
            coupled(0),
            coupled(1),
            FunctionUnit("middle", lambda *x: (self.middle(torch.cat(x, 1)),), {"middle": self.middle}),
            coupled(2),
            coupled(3),
            FunctionUnit("head", lambda *x: (self.head(torch.cat(x, 1).mean((2, 3))),), {"head": self.head}),
        ]

    def forward(self, x: Tensor) -> Tensor:
        streams: Streams = (x,)
        for unit in self.units():
            streams = unit(*streams)
        return streams[0]


def sgd(named: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for _, p in named], 0.1, momentum=0.9, weight_decay=1e-3)


def cosine(optimizer: torch.optim.Optimizer) -> CosineLRScheduler:
    return CosineLRScheduler(optimizer, t_initial=12, lr_min=0.01, warmup_t=3, t_in_epochs=False)


def batches(*sizes: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(n, *SIZE, generator=generator), torch.randint(0, 5, (n,), generator=generator)) for n in sizes]


def pipeline_of(
    method: str | Method = "petra",
    stages: int = 3,
    captured: bool = True,
    *,
    loss: Any = F.cross_entropy,
    **kwargs: Any,
) -> Pipeline:
    """A pipeline whose learning rates lie on the device, as they do on a GPU whether ticks are captured or not."""
    model, method = Small().train(), find_method(method)
    pipeline = Pipeline(
        model,
        Layout.of(model, stages, method=method, input_size=SIZE),
        method=method,
        optimization=Optimization(**{"optimizer": sgd, "scheduler": cosine, "clip_grad": 1.0, **kwargs}),
        loss=loss,
        graphs=FakeGraph if captured else "off",
    )
    for stage in pipeline.stages:
        if stage.optimizer and not stage.rates:
            stage.rates = rates_of(stage.optimizer, torch.device("cpu"), prepare=stage.prediction is None)
    return pipeline


def replayed(pipeline: Pipeline) -> int:
    assert pipeline.captured
    return pipeline.captured.replayed


def trained(pipeline: Pipeline, data: Sequence[Batch]) -> list[Output]:
    """Everything that comes out, the pipeline drained."""
    outputs = [pipeline.step(*batch) for batch in data] + pipeline.drain()
    return [output for output in outputs if output.loss is not None]


def same(found: Any, expected: Any) -> bool:
    """Whether two trees of tensors and numbers agree to the bit."""
    if isinstance(expected, Tensor):
        return torch.equal(found, expected)
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same(found[key], x) for key, x in expected.items())
    if isinstance(expected, list | tuple):
        return len(found) == len(expected) and all(map(same, found, expected))
    return bool(found == expected)


def assert_same(captured: Pipeline, plain: Pipeline, feeds: Sequence[Sequence[Batch]]) -> None:
    for data in feeds:
        ours, expected = ([vars(x) for x in trained(pipeline, data)] for pipeline in (captured, plain))
        assert same(ours, expected)
    assert same(captured.model.state_dict(), plain.model.state_dict())


def check_bits(method: str, stages: int, k: int, last_stage: str = "graph") -> None:
    """Dropout, clipping and a moving rate included, with a smaller batch in between, and behind a drain."""
    chosen = find_method(method).with_last_stage(last_stage)
    captured, plain = (pipeline_of(chosen, stages, on, accumulation_steps=k) for on in (True, False))
    full = [4] * (2 * stages + 3 * k + 2)
    assert_same(captured, plain, [batches(*full, 3, *full), batches(*full[:k])])
    assert replayed(captured) > k


@pytest.mark.parametrize(
    ("method", "stages", "k"), [("petra", 3, 1), ("petra", 3, 2), ("reversible", 2, 2), ("local", 3, 1)]
)
def test_captured_ticks_compute_the_same_bits(method: str, stages: int, k: int) -> None:
    check_bits(method, stages, k)


@pytest.mark.slow
@pytest.mark.parametrize("last_stage", ["graph", "recompute"])
@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize(
    ("method", "stages"), [("petra", 4), ("petra", 7), ("dsp", 3), ("reversible", 3), ("backprop", 2), ("local", 3)]
)
def test_captured_ticks_do_so_whatever_the_method(method: str, stages: int, k: int, last_stage: str) -> None:
    check_bits(method, stages, k, last_stage)


class Fused(torch.optim.SGD):
    """Whose future is told from its last step, for its type is not known."""


@pytest.mark.slow
@pytest.mark.parametrize("prediction", ["head", "backward"])
def test_predicted_weights_are_captured(prediction: Any) -> None:
    options: dict[str, Any] = {
        "optimizer": lambda named: Fused([p for _, p in named], 0.1, momentum=0.9, fused=True),
        "accumulation_steps": 2,
        "weight_prediction": prediction,
    }
    captured, plain = (pipeline_of("petra", 3, on, **options) for on in (True, False))
    assert_same(captured, plain, [batches(*[4] * 15)])
    assert replayed(captured)


def adamw(named: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for _, p in named], 0.01)


def lion(named: Any) -> torch.optim.Optimizer:
    from timm.optim import Lion

    return Lion([p for _, p in named], 0.01)


@pytest.mark.parametrize(
    ("optimizer", "inside"),
    [(lion, False), *(pytest.param(make, True, marks=pytest.mark.slow) for make in (sgd, adamw))],
)
def test_an_optimizer_that_cannot_be_captured_updates_outside(
    optimizer: Callable[..., Any], inside: bool, caplog: pytest.LogCaptureFixture
) -> None:
    options: dict[str, Any] = {"optimizer": optimizer, "scheduler": lambda _: None, "accumulation_steps": 2}
    captured, plain = (pipeline_of("petra", 2, on, **options) for on in (True, False))
    assert_same(captured, plain, [batches(*[4] * 12)])
    assert replayed(captured) > 2
    said = [record.getMessage() for record in caplog.records if "outside" in record.getMessage()]
    assert len(said) == (0 if inside else 1)


def test_a_replayed_tick_knows_whose_gradients_it_has_found() -> None:
    captured, plain = (pipeline_of("petra", 2, on) for on in (True, False))
    for pipeline in (captured, plain):
        for batch in batches(*[4] * 9):
            pipeline.step(*batch)
    assert replayed(captured) > 2
    assert [stage.last_backward for stage in captured.stages] == [stage.last_backward for stage in plain.stages]


def test_the_learning_rate_of_a_replayed_tick_is_the_schedules() -> None:
    pipeline = pipeline_of("backprop", 1, scheduler=lambda _: None, clip_grad=None)
    data = batches(*[4] * 8)
    trained(pipeline, data)
    (stage,) = pipeline.stages
    assert stage.optimizer
    stage.optimizer.param_groups[0]["lr"] = 0.0
    before, count = copy.deepcopy(list(pipeline.model.parameters())), replayed(pipeline)
    trained(pipeline, data[:2])
    assert replayed(pipeline) == count + 2
    assert same(list(pipeline.model.parameters()), before)
    assert isinstance(stage.optimizer.param_groups[0]["lr"], float)


def load(pipeline: Pipeline) -> None:
    pipeline.model.load_state_dict(pipeline.model.state_dict())


def move(pipeline: Pipeline) -> None:
    for p in pipeline.model.parameters():
        p.data = p.data.clone()


def reload_optimizer(pipeline: Pipeline) -> None:
    for stage in pipeline.stages:
        assert stage.optimizer
        stage.optimizer.load_state_dict(copy.deepcopy(stage.optimizer.state_dict()))  # its own tensors would stay


def freeze_statistics(pipeline: Pipeline) -> None:
    pipeline.model.get_submodule("blocks.1.1").eval()


def restore(pipeline: Pipeline) -> None:
    pipeline.load_state_dict(copy.deepcopy(pipeline.state_dict()))


def change_momentum(pipeline: Pipeline) -> None:
    for stage in pipeline.stages:
        assert stage.optimizer
        stage.optimizer.param_groups[0]["momentum"] = 0.5


def change_coupling(pipeline: Pipeline) -> None:
    pipeline.drain()
    pipeline.model.g = 0.5  # type: ignore[assignment]


def change_dropout(pipeline: Pipeline) -> None:
    pipeline.model.get_submodule("blocks.1.2").p = 0.5  # type: ignore[assignment]


def forget_momentum(pipeline: Pipeline) -> None:
    for stage in pipeline.stages:
        assert stage.optimizer
        stage.optimizer.state.clear()


def smooth_labels(pipeline: Pipeline) -> None:
    vars(pipeline.settings.loss)["label_smoothing"] = 0.1


@pytest.mark.parametrize(
    "change",
    [
        load,
        restore,
        change_coupling,
        change_dropout,
        forget_momentum,
        smooth_labels,
        *(pytest.param(change, marks=pytest.mark.slow) for change in (reload_optimizer, freeze_statistics)),
        *(pytest.param(change, marks=pytest.mark.slow) for change in (move, change_momentum)),
    ],
)
def test_what_replaces_a_tensor_drops_the_graphs(change: Callable[[Pipeline], None]) -> None:
    captured, plain = (pipeline_of("petra", 2, on, loss=nn.CrossEntropyLoss()) for on in (True, False))
    data = batches(*[4] * 8)
    for pipeline in (captured, plain):
        for batch in data:
            pipeline.step(*batch)
        change(pipeline)
    count = replayed(captured)
    assert count
    assert same(vars(captured.step(*data[0])), vars(plain.step(*data[0])))
    assert replayed(captured) == count
    assert_same(captured, plain, [data])
    assert replayed(captured) > count


def test_probes_evaluation_and_saving_leave_captured_ticks_as_they_are() -> None:
    captured, plain = (pipeline_of("petra", 2, on) for on in (True, False))
    data, seen = batches(*[4] * 8), []
    for pipeline in (captured, plain):
        for batch in data:
            pipeline.step(*batch)
        scores = [logits for logits, _ in pipeline.predict(data[:2])]
        state = copy.deepcopy({key: x for key, x in pipeline.state_dict().items() if key != "stages"})
        with pipeline.probe() as probe:
            for batch in data[:3]:
                pipeline.step(*batch)
        seen.append((scores, state, probe.measurements))
    assert replayed(captured)
    assert same(*seen)
    assert_same(captured, plain, [data])


def halve(p: nn.Parameter) -> Tensor | None:
    return None if p.grad is None else p.grad / 2


@pytest.mark.parametrize("other", [halve, lambda p: None], ids=["another", "none"])
def test_gradients_that_somebody_replaces_in_a_window_count(other: Callable[[nn.Parameter], Tensor | None]) -> None:
    captured, plain = (pipeline_of("petra", 2, on, accumulation_steps=3) for on in (True, False))
    data = batches(*[4] * 16)
    for pipeline in (captured, plain):
        for batch in data:
            pipeline.step(*batch)
        for p in pipeline.model.parameters():
            p.grad = other(p)
        for batch in data[:2]:
            pipeline.step(*batch)
    count = replayed(captured)
    assert_same(captured, plain, [data])
    assert replayed(captured) > count


def test_kinds_may_be_captured_at_different_times() -> None:
    """Drains in between cut windows short, so that some kinds of ticks are met more often than others."""
    captured, plain = (pipeline_of("petra", 2, on, accumulation_steps=2) for on in (True, False))
    assert_same(captured, plain, [batches(*[4] * n) for n in (3, 3, 3, 3, 6, 9)])
    assert replayed(captured)


@pytest.mark.parametrize("of", ["module", "weight"])
def test_a_hook_is_called_in_every_tick(of: str) -> None:
    pipeline, calls = pipeline_of("backprop", 1), []
    data = batches(*[4] * 6)
    trained(pipeline, data)
    count = replayed(pipeline)
    assert count
    layer = pipeline.model.get_submodule("blocks.1.0")
    count_call = lambda *args: calls.append(1)  # noqa: E731
    handle = (
        layer.register_forward_hook(count_call)
        if of == "module"
        else layer.get_parameter("weight").register_hook(count_call)
    )
    trained(pipeline, data)
    assert len(calls) == len(data)
    assert replayed(pipeline) == count
    handle.remove()
    trained(pipeline, data)
    assert replayed(pipeline) > count


def test_a_host_read_keeps_ticks_uncaptured_and_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    def looks(logits: Tensor, labels: Tensor) -> Tensor:
        loss = F.cross_entropy(logits, labels)
        return loss if float(loss.detach()) < 100 else loss / 2

    captured, plain = (pipeline_of("backprop", 1, on, loss=looks) for on in (True, False))
    assert_same(captured, plain, [batches(*[4] * 8)])
    assert replayed(captured) == 0
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "_local_scalar_dense" in caplog.text


@pytest.mark.parametrize("k", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_capture_that_fails_has_done_nothing(k: int) -> None:
    """What is queued and never done must not be counted either."""

    class Failing(FakeGraph):
        def capture(self, *args: Any) -> None:
            super().capture(*args)
            raise RuntimeError("the device says no")

    captured, plain = (pipeline_of("petra", 3, on, accumulation_steps=k) for on in (True, False))
    assert captured.captured
    captured.captured.make_graph = Failing
    assert_same(captured, plain, [batches(*[4] * 16)])
    assert captured.captured.refusal == "the device says no"


def test_a_stage_of_another_kind_is_not_captured() -> None:
    class Other(Stage):
        pass

    pipeline = pipeline_of(Method("other", "", Other, work="reverse", streams_travel=True), 2)
    assert pipeline.captured
    assert "Other" in str(pipeline.captured.refusal)


def test_an_unknown_setting_is_refused() -> None:
    with pytest.raises(UserError, match="'auto', 'off'"):
        Pipeline(Small(), 1, graphs="sometimes")  # type: ignore[arg-type]
