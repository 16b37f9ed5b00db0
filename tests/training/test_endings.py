"""Runs that end before all epochs are trained: by `max_updates`, by patience, because the loss runs away."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from petra_zoo.checkpoints.store import Store
from petra_zoo.errors import Failure, UserError
from petra_zoo.petra import Pipeline
from petra_zoo.settings.recipe import Recipe
from petra_zoo.settings.recipe_files import load_recipe, override_recipe
from petra_zoo.training.endings import Divergence
from petra_zoo.training.length import Length
from petra_zoo.training.optimization import learning_rates
from petra_zoo.training.progress import Reporter
from petra_zoo.training.ranks import SharedFailure
from petra_zoo.training.run import Result, train
from petra_zoo.training.stopping import RunStopped
from tests.petra.processes import run_processes
from tests.training.test_feed import write_images
from tests.training.test_resume import differing, stop_in_tick
from tests.training.test_train import QUICK

BATCHES = 2  # of an epoch
# Without batch norm nothing changes at this learning rate, so that nothing gets better.
STILL = {"lr": 1e-12, "model_kwargs": {"norm_layer": "groupnorm1"}, "epochs": 6, "log_interval": 1}


def go(folder: Path, *, name: str = "run", **settings: Any) -> Result:
    options = {key: settings.pop(key) for key in ("allow_change", "resume") if key in settings}
    data = {"dataset": "folder", "data_dir": folder / "data", "img_size": 8, "batch_size": 8}
    if not (folder / "data").exists():  # few images cost little more than the ticks themselves
        write_images(folder / "data", 8 * BATCHES)
    recipe = Recipe(**{**QUICK, **data, "output": folder / name, **settings})
    return train(recipe, reporter=Reporter(quiet=True), **options)


def log(run: Path, event: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == event]


# -- patience ---------------------------------------------------------------------------------------------------------


def test_a_run_ends_when_patience_does_and_says_why(tmp_path: Path) -> None:
    result = go(tmp_path, **STILL, patience=2)
    assert [line["epoch"] for line in log(result.path, "validation")] == [1, 2, 3]
    top1 = f"{result.evaluation.top1:.5g}"
    assert result.ended == f"patience=2: 2 validations without a better top1 than {top1}"
    assert [line["why"] for line in log(result.path, "end")] == [result.ended]
    again = go(tmp_path, **STILL, patience=2)
    assert (again.finished_before, again.ended) == (True, result.ended)


@pytest.mark.slow  # five epochs more; that a run goes on is shown below
def test_with_more_patience_a_run_goes_on_as_if_it_had_never_ended(tmp_path: Path) -> None:
    go(tmp_path, **STILL, patience=1)
    more = go(tmp_path, **STILL, patience=3, allow_change=["patience"])
    assert [line["epoch"] for line in log(more.path, "validation")] == [1, 2, 3, 4]
    undisturbed = go(tmp_path, **STILL, patience=3, name="undisturbed")
    assert differing(more.path, undisturbed.path) == []


def test_what_was_waited_for_is_saved_with_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    undisturbed = go(tmp_path, **STILL, patience=2, name="undisturbed")
    stop_in_tick(monkeypatch, 5, 15)  # in the third epoch, one validation after the best
    with pytest.raises(RunStopped):
        go(tmp_path, **STILL, patience=2)
    result = go(tmp_path, **STILL, patience=2)
    assert result.ended == undisturbed.ended
    assert differing(result.path, undisturbed.path) == []


# -- max_updates ------------------------------------------------------------------------------------------------------


def test_a_run_ends_at_so_many_updates_in_the_middle_of_an_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages: list[Any] = []
    drain = Pipeline.drain
    monkeypatch.setattr(Pipeline, "drain", lambda self: (drain(self), stages.extend(self.stages))[0])
    settings = {"epochs": None, "max_updates": 2, "accumulation_steps": 2, "log_interval": 1}
    write_images(tmp_path / "data", 24)  # 4 micro-batches, of 3 per epoch
    result = go(tmp_path, **settings)
    assert [stage.updates for stage in stages] == [2, 2, 2, 2]
    assert result.ended == "max_updates=2"
    assert [line["epoch"] for line in log(result.path, "validation")] == [1, 2]
    saved = Store(result.path / "checkpoints").newest_good()
    assert saved
    assert (saved.manifest.finished, saved.manifest.epoch, saved.manifest.batch) == (True, 1, 1)
    assert go(tmp_path, **settings).finished_before
    with pytest.raises(UserError, match="has trained 1 epoch and 1 micro-batch, which is all"):
        go(tmp_path, **settings, resume=str(result.path), name="other")


@pytest.mark.slow  # likewise
def test_a_run_by_updates_goes_on_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"epochs": None, "max_updates": 5, "log_interval": 1}
    undisturbed = go(tmp_path, **settings, name="undisturbed")
    stop_in_tick(monkeypatch, 5, 15)
    with pytest.raises(RunStopped):
        go(tmp_path, **settings)
    assert differing(go(tmp_path, **settings).path, undisturbed.path) == []


@pytest.mark.parametrize("sched", ["cosine", "wsd", "poly", "step"])
def test_a_schedule_of_updates_is_that_of_as_many_epochs(sched: str) -> None:
    by_epochs = Recipe(**{**QUICK, "epochs": 10, "warmup_epochs": 2, "cooldown_epochs": 1, "sched": sched})
    by_updates = override_recipe(by_epochs, [f"max_updates={11 * 7}"])
    a, b = (learning_rates(recipe, 7) for recipe in (by_epochs, by_updates))
    assert [a(update) for update in range(77)] == [b(update) for update in range(77)]


def test_the_schedule_ends_where_the_updates_do() -> None:
    rate = learning_rates(Recipe(**{**QUICK, "epochs": None, "max_updates": 10}), 7)
    assert rate(5) == pytest.approx(0.025)
    assert rate(10) == 0.0


def test_epochs_and_updates_take_each_others_place() -> None:
    recipe = load_recipe("digits/petra_revnet_tiny", ["max_updates=90"])
    assert (recipe.epochs, recipe.total_epochs) == (None, None)
    assert Length.of(recipe, 90) == Length(90, 2, 180, "max_updates=90")
    assert override_recipe(recipe, ["epochs=3"]).max_updates is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["max_updates=5", "epochs=2"], "epochs=2 and max_updates=5 both say how long a run is"),
        (["epochs=null"], "epochs=null: expected a whole number, or max_updates"),
        (["patience=0"], "patience=0: expected greater than or equal to 1"),
        (["patience=3", "val_interval=20"], "the only one is at the end: .* expected val_interval=19 or less"),
    ],
)
def test_what_does_not_go_together_is_one_line(settings: Sequence[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_recipe("digits/petra_revnet_tiny", settings)
    assert "\n" not in str(caught.value)


def test_patience_that_the_updates_leave_nothing_to_count_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"patience=1 counts validations.*the run has 1 epoch in all"):
        go(tmp_path, epochs=None, max_updates=BATCHES, patience=1)


# -- divergence -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("readings", "settings", "found"),
    [
        ([2.4, 5.0, 6.0, 7.0], {}, True),
        ([5.0, 6.0, 4.0, 6.0, 7.0], {}, False),  # never three in a row above twice log(10)
        ([9.0, 8.0, 7.0, 6.0, 5.0, 4.7], {}, False),  # it comes down again
        ([2.3, 3.5, 4.5, 4.6, 4.4, 2.0], {}, False),  # a warm-up
        ([9.0, 9.5, 9.9], {"on_divergence": "ignore"}, False),
        ([1.2, 1.5, 1.4], {"loss": "bce"}, False),  # of log(2), one is below twice
        ([9.0, 30.0, 20.0, 22.0], {"kd_model_name": "some/run"}, False),  # ten times the start is not reached
        ([9.0, 30.0, 25.0, 26.0], {"kd_model_name": "some/run"}, True),
    ],
)
def test_a_loss_that_runs_away_is_told_from_one_that_comes_down(
    readings: list[float], settings: dict[str, Any], found: bool
) -> None:
    watch = Divergence(Recipe(**QUICK, **settings), 10)
    watch.start = 2.4 if "loss" not in settings else 0.7
    for loss in readings:
        watch.saw(loss)
    assert (watch.found is not None) is found


RISING = {"epochs": 8, "val_interval": 100, "log_interval": 1, "lr": 2.0}  # 3, 43, 3 and 6, where guessing gives 0.7


def test_training_that_diverges_stops_and_says_what_to_lower(tmp_path: Path) -> None:
    with pytest.raises(Failure) as caught:
        go(tmp_path, **RISING)
    for words in ("the loss runs away: it began with", "guessing gives 0.6931", "lower lr (it is 2;", "D_0 = 6"):
        assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(log(tmp_path / "run", "diverged")) == 1


# -- several processes ------------------------------------------------------------------------------------------------


def end_in_a_rank(folder: str) -> tuple[str, str]:
    ended = go(Path(folder), **STILL, patience=1, balance="operations").ended
    with pytest.raises(SharedFailure) as caught:
        go(Path(folder), **RISING, balance="operations", name="rising")
    return ended, str(caught.value)


@pytest.mark.dist
@pytest.mark.slow  # two processes import torch
@pytest.mark.timeout(300)
def test_all_processes_end_together_by_what_one_of_them_has_seen(tmp_path: Path) -> None:
    write_images(tmp_path / "data", 8 * BATCHES)
    first, last = run_processes(2, tmp_path, end_in_a_rank, str(tmp_path))
    assert first == last
    assert first[0].startswith("patience=1: 1 validation without a better top1")
    assert "the loss runs away" in first[1]
