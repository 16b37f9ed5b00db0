"""A stage whose reconstruction has drifted says so, once."""

import pytest
import torch

from petra_zoo.petra.drift import DriftGuard
from tests.petra.chain import Chain, data, make_chain_pipeline
from tests.petra.fake_graph import FakeGraph
from tests.petra.test_pipeline import make_model, make_pipeline, sgd


def guarded(lr: float, every: int, method: str = "petra") -> DriftGuard:
    pipeline = make_chain_pipeline(Chain(), method=method, optimizer=sgd(lr))
    guard = DriftGuard(pipeline.stages, every, 0.1)
    for n, batch in enumerate(data(20)):
        guard.feed(n)
        pipeline.step(*batch)
    pipeline.drain()
    assert all(stage.watcher is None for stage in pipeline.stages)
    return guard


def test_a_stage_that_has_drifted_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    guard = guarded(3.0, every=5)
    assert max(unchanged for _, unchanged in guard.errors.values()) < 1e-12
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == len({text.split()[1] for text in warnings}) > 0
    assert "more than drift_limit=0.1" in warnings[0]


def test_small_steps_and_unchanged_weights_do_not_alarm(caplog: pytest.LogCaptureFixture) -> None:
    assert 0.0 < max(error for error, _ in guarded(0.001, every=4).errors.values()) < 0.1
    assert max(error for error, _ in guarded(3.0, every=4, method="reversible").errors.values()) < 1e-12
    assert not caplog.records


def test_methods_that_reconstruct_nothing_have_nothing_to_watch() -> None:
    assert guarded(3.0, every=1, method="dsp").errors == {}


def test_watching_changes_no_bits_and_statistics_are_seen_once() -> None:
    found = []
    for watched in (False, True):
        model = make_model(drop_path_rate=0.2)
        pipeline = make_pipeline(model, 3)
        guard = DriftGuard(pipeline.stages, 2, 0.5)
        generator = torch.Generator().manual_seed(1)
        for n in range(5):
            if watched:
                guard.feed(n)
            images = torch.randn(4, 3, 8, 8, generator=generator, dtype=torch.float64)
            pipeline.step(images, torch.arange(4))
        found.append(model.state_dict())
        assert bool(guard.errors) == watched
    assert [name for name, x in found[0].items() if not torch.equal(x, found[1][name])] == []


def test_ticks_in_between_are_replayed() -> None:
    pipeline = make_chain_pipeline(Chain(), optimizer=sgd(0.01), graphs=FakeGraph)
    guard = DriftGuard(pipeline.stages, 20, 0.5)
    for n, batch in enumerate(data(45)):
        guard.feed(n)
        pipeline.step(*batch)
    assert pipeline.captured is not None
    assert pipeline.captured.replayed > 10
    assert guard.errors
