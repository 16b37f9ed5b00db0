"""No stage applies what is not finite; what is left out of a window is as if it had never been fed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from petra_zoo.petra import METHODS, NotFiniteError, Pipeline, first_not_finite
from tests.petra.chain import Chain, data, make_chain_pipeline
from tests.petra.fake_graph import FakeGraph
from tests.petra.processes import own_world, run_processes
from tests.petra.test_pipeline import batches, make_model, make_pipeline, sgd

DELAYED = ("petra", "dsp", "delayed")
BAD = 3  # the micro-batch
STAGES = 5


def spoil(layer: nn.Module, call: int, value: float = float("nan")) -> None:
    """The output of a layer's call, counted from 0 and without those of recomputations, is not finite."""
    calls = [0]

    def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        calls[0] += 1
        return output * value if calls[0] == call + 1 else output

    layer.register_forward_hook(hook)


def adam(named: Any) -> Any:
    return torch.optim.Adam([p for _, p in named], 0.01)


def fed_with(pipeline: Pipeline, feeds: list[Any]) -> None:
    """Feeds micro-batches; nothing in a tick whose is None."""
    for batch in feeds:
        pipeline._run_tick(None, feeding=False) if batch is None else pipeline.step(*batch)
    pipeline.drain()


def with_a_bad_image(feeds: list[tuple[Tensor, Tensor]], *bad: int) -> list[tuple[Tensor, Tensor]]:
    for n in bad:
        feeds[n][0].view(-1)[0] = float("nan")
    return feeds


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(map(torch.equal, a, b))


@pytest.mark.parametrize("optimizer", [sgd(0.05), adam], ids=["sgd", "adam"])
@pytest.mark.parametrize("method", DELAYED)
def test_a_skipped_micro_batch_is_one_that_was_never_fed(method: str, optimizer: Any) -> None:
    feeds = with_a_bad_image(data(12), BAD)
    model, other = Chain(), Chain()
    pipeline = make_chain_pipeline(model, method=method, optimizer=optimizer, on_nonfinite="skip")
    fed_with(pipeline, feeds)
    fed_with(
        make_chain_pipeline(other, method=method, optimizer=optimizer),
        [None if n == BAD else batch for n, batch in enumerate(feeds)],
    )
    assert pipeline.skipped == 1
    assert same(weights(model), weights(other))


@pytest.mark.parametrize("method", ["backprop", "reversible", "petra"])
def test_a_windows_mean_is_over_the_micro_batches_that_are_left(method: str) -> None:
    feeds = with_a_bad_image(data(3), 1)
    model, other = Chain(), Chain()
    settings: dict[str, Any] = {"method": method, "optimizer": sgd(0.05)}
    fed_with(make_chain_pipeline(model, accumulation_steps=3, on_nonfinite="skip", **settings), feeds)
    fed_with(make_chain_pipeline(other, accumulation_steps=2, **settings), [feeds[0], feeds[2]])
    assert same(weights(model), weights(other))


@pytest.mark.parametrize("stage", [0, 2, STAGES - 1])
@pytest.mark.parametrize("method", [method for method in METHODS if method != "local"])  # a chain has no pixels
def test_weights_stay_finite_wherever_it_begins(method: str, stage: int) -> None:
    for on_nonfinite in ("stop", "skip"):
        model = Chain()
        pipeline = make_chain_pipeline(model, method=method, optimizer=sgd(0.05), on_nonfinite=on_nonfinite)
        pipeline.settings.finite.raises = False
        spoil(model.layers[stage], 7)
        feeds = data(14)
        for batch in feeds:
            pipeline.step(*batch)
        pipeline.drain()
        assert first_not_finite(model) is None
        assert (pipeline.settings.finite.told is not None) == (on_nonfinite == "stop")
        assert pipeline.skipped == (1 if on_nonfinite == "skip" else 0)


@pytest.mark.parametrize("graphs", [FakeGraph, "off"])
@pytest.mark.parametrize("optimizer", [sgd(0.05), adam, sgd(0.05, momentum=0.0)], ids=["sgd", "adam", "plain"])
def test_where_nobody_reads_numbers_an_update_is_held_back(graphs: Any, optimizer: Any) -> None:
    model = Chain()
    pipeline = make_chain_pipeline(model, optimizer=optimizer, graphs=graphs)
    pipeline.settings.finite.deferred, pipeline.settings.finite.raises = True, False
    feeds = with_a_bad_image(data(24), 18)
    for batch in feeds:
        pipeline.step(*batch)
    pipeline.drain()
    assert first_not_finite(model) is None
    told = pipeline.settings.finite.told
    assert told is not None
    assert (str(told), told.fed) == (f"the loss of stage {STAGES - 1} is nan", range(18, 19))


@pytest.mark.parametrize("bad", [2, 18])
def test_what_is_skipped_by_numbers_that_nobody_reads_is_what_the_host_would_skip(bad: int) -> None:
    """In captured ticks too."""
    found = []
    for graphs, deferred in (("off", False), ("off", True), (FakeGraph, True)):
        model = Chain()
        fused = lambda named: torch.optim.SGD([p for _, p in named], 0.0625, momentum=0.9, fused=True)  # noqa: E731
        pipeline = make_chain_pipeline(model, optimizer=fused, graphs=graphs, on_nonfinite="skip")
        pipeline.settings.finite.deferred = deferred
        fed_with(pipeline, with_a_bad_image(data(24), bad))
        assert pipeline.skipped == 1
        found.append(weights(model))
        if graphs == FakeGraph:
            assert pipeline.captured is not None
            assert pipeline.captured.replayed > 5
    assert same(found[0], found[1])
    assert same(found[0], found[2])


@pytest.mark.parametrize(
    ("method", "deferred"), [("petra", True), ("petra", False), ("backprop", False), ("local", False)]
)
def test_statistics_that_a_micro_batch_would_spoil_are_as_before_it(method: str, deferred: bool) -> None:
    model, other = make_model(), make_model()
    feeds = batches(5)
    good = [feeds[n] for n in (0, 1, 3, 4)]
    feeds[2][0].view(-1)[0] = float("nan")
    frozen = {"method": method, "optimizer": sgd(0.0)}
    pipeline = make_pipeline(model, 3, on_nonfinite="skip", **frozen)
    pipeline.settings.finite.deferred = deferred
    fed_with(pipeline, feeds)
    fed_with(make_pipeline(other, 3, **frozen), good)
    assert [name for name, x in model.named_buffers() if not torch.equal(x, other.get_buffer(name))] == []


def test_finite_numbers_are_the_same_bits_with_skip_as_without() -> None:
    found = []
    for on_nonfinite in ("stop", "skip"):
        model = make_model()
        pipeline = make_pipeline(model, 3, on_nonfinite=on_nonfinite, accumulation_steps=2)
        fed_with(pipeline, list(batches(4)))
        found.append([x.clone() for x in model.state_dict().values()])
    assert same(*found)


def test_an_error_says_which_micro_batches_it_is_of() -> None:
    pipeline = make_chain_pipeline(Chain(), optimizer=sgd(0.05))
    with pytest.raises(NotFiniteError) as caught:
        fed_with(pipeline, with_a_bad_image(data(8), 2))
    assert caught.value.fed == range(2, 3)
    model = Chain()
    model.layers[1].weight.register_hook(lambda d: d * float("inf"))
    with pytest.raises(NotFiniteError, match="the gradient of stage 1") as caught:
        fed_with(make_chain_pipeline(model, method="backprop", optimizer=sgd(0.05), accumulation_steps=3), data(8))
    assert caught.value.fed == range(3)


def test_what_a_window_has_left_out_is_saved() -> None:
    feeds = with_a_bad_image(data(8), 2)
    settings: dict[str, Any] = {"optimizer": sgd(0.05), "accumulation_steps": 4, "on_nonfinite": "skip"}
    model, other = Chain(), Chain(seed=1)
    pipeline, resumed = make_chain_pipeline(model, **settings), make_chain_pipeline(other, **settings)
    for batch in feeds[:7]:
        pipeline.step(*batch)
    resumed.load_state_dict(pipeline.state_dict())
    for p in (pipeline, resumed):
        fed_with(p, feeds[7:])
    assert resumed.skipped == 1
    assert same(weights(model), weights(other))


def train_in_a_rank(on_nonfinite: str) -> tuple[list[Tensor], int, str]:
    world = own_world()
    model = Chain()
    pipeline = make_chain_pipeline(model, world=world, optimizer=sgd(0.05), on_nonfinite=on_nonfinite)
    pipeline.settings.finite.raises = world.alone
    for batch in with_a_bad_image(data(12), BAD):
        pipeline.step(*batch) if world.first else pipeline.step()
    pipeline.drain()
    return weights(model), pipeline.skipped, str(pipeline.settings.finite.told)


@pytest.mark.dist
@pytest.mark.slow  # two processes import torch
@pytest.mark.timeout(200)
@pytest.mark.parametrize("on_nonfinite", ["stop", "skip"])
def test_two_processes_leave_out_the_same(on_nonfinite: str, tmp_path: Path) -> None:
    model = Chain()
    pipeline = make_chain_pipeline(model, optimizer=sgd(0.05), on_nonfinite=on_nonfinite)
    pipeline.settings.finite.raises = False
    fed_with(pipeline, with_a_bad_image(data(12), BAD))
    ranks = run_processes(2, tmp_path, train_in_a_rank, on_nonfinite)
    assert ranks[1][2] == str(pipeline.settings.finite.told)
    assert max(skipped for _, skipped, _ in ranks) == pipeline.skipped
    for alone, *spread in zip(weights(model), ranks[0][0], ranks[1][0], strict=True):
        (here,) = [x for x in spread if not x.is_meta]
        assert torch.equal(here, alone)
