"""Runs that go on with other settings or data than they were saved with, and commands that may not."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from petra_zoo.errors import Failure, UserError
from petra_zoo.evaluation.checkpoint_evaluation import evaluate_checkpoint
from petra_zoo.petra import Pipeline
from petra_zoo.settings.recipe import Recipe
from petra_zoo.training.optimization import learning_rates
from petra_zoo.training.progress import Reporter
from petra_zoo.training.run import Result, train
from petra_zoo.training.stopping import RunStopped
from tests.training.test_resume import BASE

SMALL = {**BASE, "lr": 0.05, "warmup_epochs": 0, "method": "backprop", "opt": "sgd", "log_interval": 1}
BATCHES = 5


def go(output: Path, settings: dict[str, Any], *allowed: str, **options: Any) -> Result:
    recipe = Recipe(**{**SMALL, **settings, "output": output})
    return train(recipe, name="small", reporter=Reporter(quiet=True), allow_change=allowed, **options)


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The learning rate of every tick: what the optimizer has."""
    found: list[float] = []
    real = Pipeline.step

    def step(self: Pipeline, *batch: Any) -> Any:
        assert self.stages[0].optimizer
        found.append(self.stages[0].optimizer.param_groups[0]["lr"])
        return real(self, *batch)

    monkeypatch.setattr(Pipeline, "step", step)
    return found


def stop_in_tick(monkeypatch: pytest.MonkeyPatch, output: Path, settings: dict[str, Any], tick: int) -> None:
    """Stops a run behind a tick, saved."""
    with monkeypatch.context() as patch:
        patch.setattr(
            "petra_zoo.training.stopping.Deadline.passed", property(lambda self: left.pop() if left else True)
        )
        left = [False] * (tick - 1)
        with pytest.raises(RunStopped):
            go(output, settings)


@pytest.mark.parametrize(
    "changed", [{"epochs": 4}, {"lr": 0.2, "epochs": 4}, {"sched": "step", "decay_epochs": 1, "epochs": 3}]
)
def test_a_run_goes_on_by_the_schedule_of_its_settings_now(
    tmp_path: Path, rates: list[float], changed: dict[str, Any]
) -> None:
    go(tmp_path / "run", {})
    rates.clear()
    go(tmp_path / "run", changed, *changed)
    rate = learning_rates(Recipe(**{**SMALL, **changed}), BATCHES)
    assert rates == [rate(n) for n in range(2 * BATCHES, changed["epochs"] * BATCHES)]


def test_other_settings_of_an_optimizer_reach_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go(tmp_path / "run", {})
    found = set()
    real = Pipeline.step

    def step(self: Pipeline, *batch: Any) -> Any:
        assert self.stages[0].optimizer
        found.update((group["momentum"], group["weight_decay"]) for group in self.stages[0].optimizer.param_groups)
        return real(self, *batch)

    monkeypatch.setattr(Pipeline, "step", step)
    changed = {"epochs": 3, "momentum": 0.5, "weight_decay": 0.03}
    go(tmp_path / "run", changed, *changed)
    assert found == {(0.5, 0.03), (0.5, 0.0)}


def test_with_other_windows_a_schedule_stands_where_the_run_does(
    tmp_path: Path, rates: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_in_tick(monkeypatch, tmp_path / "run", {"epochs": 4}, 2 * BATCHES)
    rates.clear()
    go(tmp_path / "run", {"epochs": 4, "accumulation_steps": 5}, "accumulation_steps")
    rate = learning_rates(Recipe(**{**SMALL, "epochs": 4, "accumulation_steps": 5}), BATCHES)
    assert rates == [rate(2)] * 5 + [rate(3)] * 5
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["update"] for line in logged if line["event"] == "validation"][-1] == 4


def test_windows_that_run_on_over_an_epochs_end_are_what_a_schedule_counts() -> None:
    rate = learning_rates(Recipe(**{**SMALL, "epochs": 8, "accumulation_steps": 4}), 6)
    assert rate(6) == pytest.approx(0.025)
    assert rate(12) == 0.0
    steps = {"epochs": 8, "accumulation_steps": 4, "sched": "step", "decay_epochs": 4}
    rate = learning_rates(Recipe(**{**SMALL, **steps}), 6)
    assert (rate(5), rate(6)) == (0.05, pytest.approx(0.005))


def test_a_moving_average_that_is_wanted_later_begins_where_the_model_is(tmp_path: Path) -> None:
    go(tmp_path / "run", {})
    before = load_file(tmp_path / "run" / "model.safetensors")
    changed = {"epochs": 3, "model_ema": True, "model_ema_decay": 0.99999}
    go(tmp_path / "run", changed, *changed)
    after = load_file(tmp_path / "run" / "model.safetensors")
    differing = {name: float((x - after[name]).abs().max()) for name, x in before.items() if x.is_floating_point()}
    assert max(differing.values()) < 1e-3


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"epochs": 1, "smoothing": 0.2}, "all that there are to train"),
        ({"epochs": 3, "dataset": "synthetic:5x8x128"}, "another model's"),
    ],
)
def test_a_command_that_is_refused_changes_nothing(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    go(tmp_path / "run", {})
    before = files_in(tmp_path / "run")
    with pytest.raises(UserError, match=message):
        go(tmp_path / "run", changed, *changed)
    assert files_in(tmp_path / "run") == before


def files_in(run: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"}


@pytest.mark.parametrize("changed", [{"opt": "adamw"}, {"layer_decay": 0.5}, {"freeze": "backbone"}])
def test_what_the_saved_state_is_of_cannot_change(tmp_path: Path, changed: dict[str, Any]) -> None:
    go(tmp_path / "run", {})
    with pytest.raises(UserError, match=f"what is saved is of this {next(iter(changed))}"):
        go(tmp_path / "run", {**changed, "epochs": 3}, *changed, "epochs")


@pytest.mark.parametrize("changed", [{"batch_size": 64}, {"dataset": "synthetic:4x8x90"}])
def test_an_epoch_that_was_left_in_the_middle_cannot_become_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any]
) -> None:
    stop_in_tick(monkeypatch, tmp_path / "run", {}, 3)
    with pytest.raises(UserError, match=r"3 micro-batches into an epoch of 128 images in 5 micro-batches, and now"):
        go(tmp_path / "run", changed, *changed)


def test_other_data_is_said_and_trained_on_from_the_end_of_an_epoch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    go(tmp_path / "run", {})
    changed = {"epochs": 3, "dataset": "synthetic:4x8x90"}
    recipe = Recipe(**{**SMALL, **changed, "output": tmp_path / "run"})
    train(recipe, reporter=Reporter(), allow_change=list(changed))
    assert "there are 90 training images, and were 128 when it was saved" in capsys.readouterr().out


def test_the_best_model_of_a_future_that_is_given_up_is_set_aside(tmp_path: Path) -> None:
    best = {"checkpoint_metric": "loss", "keep_last": 9, "dataset": "digits", "batch_size": 64}
    go(tmp_path / "run", {**best, "epochs": 3})
    future = (tmp_path / "run" / "model.safetensors").read_bytes()
    first = min((tmp_path / "run" / "checkpoints").iterdir())
    recipe = {**best, "epochs": 2, "lr": 1e-6}  # no better than it was then
    go(tmp_path / "run", recipe, "lr", "epochs", resume=str(first))
    assert (tmp_path / "run" / "aside-1" / "model.safetensors").read_bytes() == future
    assert (tmp_path / "run" / "model.safetensors").read_bytes() != future


def test_an_average_is_updated_once_with_every_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    updates: list[int] = []
    real = Pipeline.step

    def step(self: Pipeline, *batch: Any) -> Any:
        updates.append(1)
        return real(self, *batch)

    monkeypatch.setattr(Pipeline, "step", step)
    averaged: list[int] = []
    monkeypatch.setattr("timm.utils.ModelEmaV3.update", lambda self, model, step=None: averaged.append(1))
    go(tmp_path / "run", {"model_ema": True, "coupling_epochs": 0})
    assert len(averaged) == len(updates) == 2 * BATCHES


def test_a_loss_begins_with_the_first_epochs_where_epochs_are_shorter_than_the_logs_interval(tmp_path: Path) -> None:
    from petra_zoo.training.observer import Observer

    seen: list[Observer] = []
    real = Observer.__init__

    def init(self: Observer, *args: Any) -> None:
        real(self, *args)
        seen.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Observer, "__init__", init)
        go(tmp_path / "first", {"epochs": 1})
        go(tmp_path / "later", {"epochs": 4, "log_interval": 12, "sched": "constant"})
    assert seen[1].divergence.start == pytest.approx(seen[0].divergence.start)


def test_more_classes_than_the_data_has_can_be_mixed(tmp_path: Path) -> None:
    go(tmp_path / "run", {"epochs": 1, "num_classes": 10, "smoothing": 0.1, "mixup": 0.2})


def test_an_optimizer_with_a_type_among_its_settings_is_saved_and_goes_on(tmp_path: Path) -> None:
    go(tmp_path / "whole", {"opt": "adafactorbv", "epochs": 3})
    go(tmp_path / "run", {"opt": "adafactorbv"})
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    result = go(tmp_path / "run", {"opt": "adafactorbv", "epochs": 3}, "epochs")
    assert result.evaluation.images > 0


def test_a_best_model_of_which_nothing_is_known_is_set_aside(tmp_path: Path) -> None:
    go(tmp_path / "run", {"epochs": 3, "keep_last": 9})  # without a metric
    newest = (tmp_path / "run" / "model.safetensors").read_bytes()
    first = min((tmp_path / "run" / "checkpoints").iterdir())
    changed = {"checkpoint_metric": "loss", "lr": 1e-6, "epochs": 2}
    go(tmp_path / "run", {"keep_last": 9, **changed}, *changed, resume=str(first))
    assert (tmp_path / "run" / "aside-1" / "model.safetensors").read_bytes() == newest
    measured = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert evaluate_checkpoint(str(tmp_path / "run"), SMALL["dataset"]).evaluation.loss == pytest.approx(
        measured["loss"], rel=1e-4
    )


@pytest.mark.parametrize("changed", [{"seed": 7}, {"sampler": "balanced"}])
def test_the_order_of_an_epoch_that_was_left_in_the_middle_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any]
) -> None:
    stop_in_tick(monkeypatch, tmp_path / "run", {}, 3)
    with pytest.raises(UserError, match=f"in the middle of an epoch, whose order {next(iter(changed))} decides"):
        go(tmp_path / "run", changed, *changed)


@pytest.mark.parametrize("changed", [{"img_size": 12}, {"smoothing": 0.1}])
def test_micro_batches_in_flight_keep_their_form(tmp_path: Path, changed: dict[str, Any]) -> None:
    delayed = {"method": "petra", "stages": 3, "keep_last": 9}
    go(tmp_path / "run", delayed)
    first = min((tmp_path / "run" / "checkpoints").iterdir())
    with pytest.raises(UserError, match=f"micro-batches in flight, made with {next(iter(changed))} as it was"):
        go(tmp_path / "run", {**delayed, **changed}, *changed, resume=str(first))


def test_patience_by_another_metric_counts_anew(tmp_path: Path) -> None:
    go(tmp_path / "run", {"checkpoint_metric": "loss", "lr": 1e-6})
    changed = {"checkpoint_metric": "top1", "patience": 1, "epochs": 3}
    go(tmp_path / "run", {**changed, "lr": 1e-6}, *changed)


def test_a_finished_run_goes_on_into_a_cooldown(tmp_path: Path) -> None:
    go(tmp_path / "run", {})
    go(tmp_path / "run", {"cooldown_epochs": 1}, "cooldown_epochs")
    assert (tmp_path / "run" / "summary.csv").read_text().count("\n") == 4


def test_a_setting_that_cannot_change_is_no_hint(tmp_path: Path) -> None:
    go(tmp_path / "run", {"epochs": 1})
    with pytest.raises(UserError) as caught:
        go(tmp_path / "run", {"opt": "adamw", "epochs": 1})
    assert "allow-change" not in str(caught.value)


def test_a_finished_run_without_checkpoints_says_that_it_cannot_go_on(tmp_path: Path) -> None:
    go(tmp_path / "run", {"checkpoint_every": None, "epochs": 1})
    with pytest.raises(UserError, match="is finished and has no checkpoint to go on from"):
        go(tmp_path / "run", {"checkpoint_every": None}, "epochs")


def test_the_images_of_a_batch_that_is_not_finite_are_named_behind_other_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go(tmp_path / "run", {"epochs": 1})
    real, ticks = Pipeline.step, []

    def step(self: Pipeline, images: Any, labels: Any) -> Any:
        ticks.append(1)
        spoilt = (images[0] * float("nan"), *images[1:]) if len(ticks) == 2 else images
        return real(self, spoilt, labels)

    monkeypatch.setattr(Pipeline, "step", step)
    with pytest.raises(Failure, match=r"micro-batch 2 of epoch 2"):
        go(tmp_path / "run", {"batch_size": 64}, "batch_size", "epochs")
