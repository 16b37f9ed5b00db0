"""Runs that are stopped, killed or damaged, and go on: the same bits as one that was never disturbed."""

import csv
import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from petra_zoo.checkpoints.store import Store
from petra_zoo.data.loader import ImageLoader
from petra_zoo.errors import UserError
from petra_zoo.evaluation.checkpoint_evaluation import evaluate_checkpoint
from petra_zoo.petra import METHODS, Pipeline
from petra_zoo.settings.recipe import Recipe
from petra_zoo.settings.recipe_files import load_recipe
from petra_zoo.training.progress import Reporter
from petra_zoo.training.resuming import check_unchanged, remember_launch, with_the_launchs_directory
from petra_zoo.training.run import Result, train
from petra_zoo.training.run_lock import held_by_this_run
from petra_zoo.training.saving import Saver
from petra_zoo.training.stopping import RunStopped, parse_duration

# Five micro-batches per epoch, the last one smaller; windows of two close across the end of an epoch.
BASE = {"model": "petra_revnet_tiny", "dataset": "synthetic:4x8x128", "batch_size": 29, "workers": 0, "epochs": 2}
SMALL = {**BASE, "lr": 0.05, "warmup_epochs": 1, "stages": 4, "accumulation_steps": 2, "train_crop_mode": "pad"}


class Died(BaseException):
    """The process is gone."""


def go(output: Path, settings: dict[str, Any], **options: Any) -> Result:
    recipe = Recipe(**{**SMALL, **settings, "output": output})
    return train(recipe, name="small", reporter=Reporter(quiet=True), **options)


@pytest.fixture
def die_in_tick(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Ends the next run in the middle of a tick, counted from 1; without anything being tidied up."""
    real = Pipeline.step

    def arrange(tick: int) -> None:
        left = [tick]

        def step(self: Pipeline, *batch: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                monkeypatch.setattr(Pipeline, "step", real)
                raise Died
            return real(self, *batch)

        monkeypatch.setattr(Pipeline, "step", step)

    return arrange


def differing(a: Path, b: Path) -> list[str]:
    """What two runs have left that is not the same."""
    first, second = (load_file(run / "model.safetensors") for run in (a, b))
    found = [name for name in first if not torch.equal(first[name], second[name])]
    found += ["summary.csv"] if (a / "summary.csv").read_text() != (b / "summary.csv").read_text() else []
    logs = [[without_times(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (a, b)]
    return found + (["metrics.jsonl"] if logs[0] != logs[1] else [])


def without_times(line: str) -> dict[str, Any]:
    return {key: x for key, x in json.loads(line).items() if key not in ("seconds", "images_per_second")}


CASES: dict[str, dict[str, Any]] = {
    **{method: {"method": method} for method in METHODS},
    "ema": {"model_ema": True, "model_ema_decay": 0.5, "drop_path": 0.2, "opt": "adamw", "clip_grad": 1.0},
    "mixup": {"mixup": 0.2, "smoothing": 0.1, "aa": "rand-m3-n1", "weight_prediction": "head"},
    "bf16": {"amp": True, "channels_last": True, "wire_up": "bfloat16", "sched": "step", "decay_epochs": 1},
    "lookahead": {"opt": "lookahead_sgd", "method": "delayed", "drop": 0.1},
}
FAST = ("petra",)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow, id=name) for name in CASES]
)
def test_a_run_that_dies_goes_on_to_the_same_bits(
    name: str, tmp_path: Path, die_in_tick: Callable[[int], None]
) -> None:
    """Saved behind ticks 3 and 6: mid-epoch, mid-window, with a full pipeline."""
    settings = {**CASES[name], "checkpoint_every": "3 ticks", "log_interval": 1}
    go(tmp_path / "undisturbed", {**CASES[name], "checkpoint_every": None, "log_interval": 1})
    for tick in (5, 5):  # dies in tick 5; goes on behind 3 and dies in tick 8
        die_in_tick(tick)
        with pytest.raises(Died):
            go(tmp_path / "run", settings)
    assert [name[-1] for name in Store(tmp_path / "run" / "checkpoints").names()] == ["6"]
    go(tmp_path / "run", settings)
    assert differing(tmp_path / "run", tmp_path / "undisturbed") == []


@pytest.mark.slow
def test_loaders_workers_change_nothing(tmp_path: Path, die_in_tick: Callable[[int], None]) -> None:
    go(tmp_path / "undisturbed", {})
    die_in_tick(4)
    with pytest.raises(Died):
        go(tmp_path / "run", {"checkpoint_every": "1 tick", "workers": 2})
    go(tmp_path / "run", {"checkpoint_every": "1 tick", "workers": 2})
    assert differing(tmp_path / "run", tmp_path / "undisturbed") == []


@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over_and_an_older_one_used(
    tmp_path: Path, die_in_tick: Callable[[int], None], caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"checkpoint_every": "1 tick", "keep_last": 2, "epochs": 1}
    go(tmp_path / "undisturbed", {"epochs": 1})
    die_in_tick(4)
    with pytest.raises(Died):
        go(tmp_path / "run", settings)
    newest = tmp_path / "run" / "checkpoints" / "tick-0000000003"
    content = bytearray((newest / "stage-001.safetensors").read_bytes())
    content[-1] ^= 1
    (newest / "stage-001.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"--resume .*stage-001\.safetensors is damaged"):
        go(tmp_path / "run", settings, resume=str(newest))
    go(tmp_path / "run", settings)
    assert "tick-0000000003 is passed over" in caplog.text
    assert differing(tmp_path / "run", tmp_path / "undisturbed") == []


def stop_in_tick(monkeypatch: pytest.MonkeyPatch, tick: int, number: int) -> None:
    real, left = Pipeline.step, [tick]

    def step(self: Pipeline, *batch: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), number)
        return real(self, *batch)

    monkeypatch.setattr(Pipeline, "step", step)


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, *(pytest.param(n, marks=pytest.mark.slow) for n in (signal.SIGINT, signal.SIGUSR1))]
)
def test_a_signal_ends_the_tick_and_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    before = signal.getsignal(number)
    with monkeypatch.context() as patched:
        stop_in_tick(patched, 3, number)
        with pytest.raises(RunStopped, match=f"stopped by {signal.Signals(number).name}: .*run is saved"):
            go(tmp_path / "run", {"epochs": 1, "checkpoint_every": None})
    assert signal.getsignal(number) is before
    assert Store(tmp_path / "run" / "checkpoints").names() == ["tick-0000000003"]
    if number == signal.SIGTERM:
        go(tmp_path / "run", {"epochs": 1, "checkpoint_every": None})
        go(tmp_path / "undisturbed", {"epochs": 1})
        assert differing(tmp_path / "run", tmp_path / "undisturbed") == []


@pytest.mark.slow
def test_a_second_signal_ends_the_process_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    stop_in_tick(monkeypatch, 2, signal.SIGTERM)
    real = Store.begin

    def begin(self: Store, tick: int) -> Path:
        os.kill(os.getpid(), signal.SIGTERM)
        return real(self, tick)

    monkeypatch.setattr(Store, "begin", begin)
    with pytest.raises(RunStopped):
        go(tmp_path / "run", {"epochs": 1})
    assert codes == [128 + signal.SIGTERM]


def test_the_time_that_is_given_ends_a_run_saved(tmp_path: Path) -> None:
    with pytest.raises(RunStopped, match="stopped by --max-time"):
        go(tmp_path / "run", {}, max_seconds=0.0)
    assert Store(tmp_path / "run" / "checkpoints").names() == ["tick-0000000001"]
    assert (parse_duration("1h30m"), parse_duration("45m"), parse_duration("90s")) == (5400.0, 2700.0, 90.0)
    with pytest.raises(UserError, match="'soon' is no time: expected such as 1h30m"):
        parse_duration("soon")


@pytest.mark.slow
def test_a_run_in_another_thread_trains_without_signals(tmp_path: Path) -> None:
    results: list[Result] = []
    thread = threading.Thread(target=lambda: results.append(go(tmp_path / "run", {"epochs": 1})))
    thread.start()
    thread.join()
    assert results[0].evaluation.images > 0


def test_a_finished_run_says_so_and_trains_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = go(tmp_path / "run", {"epochs": 1})
    monkeypatch.setattr(Pipeline, "step", None)
    again = go(tmp_path / "run", {"epochs": 1})
    assert again.finished_before
    assert not first.finished_before
    assert (again.evaluation.top1, again.evaluation.loss) == (first.evaluation.top1, first.evaluation.loss)
    with pytest.raises(UserError, match="already holds a run"):
        go(tmp_path / "run", {"epochs": 1}, resume="never")


def test_other_settings_are_refused_by_name_unless_they_are_allowed(tmp_path: Path) -> None:
    with pytest.raises(RunStopped):
        go(tmp_path / "run", {}, max_seconds=0.0)
    with pytest.raises(UserError, match=r"lr was 0\.05 and is 0\.1, .*--allow-change lr --allow-change momentum"):
        go(tmp_path / "run", {"lr": 0.1, "momentum": 0.5})
    with pytest.raises(UserError, match="--allow-change lrr: there is no such setting"):
        go(tmp_path / "run", {"lr": 0.1}, allow_change=["lrr"])
    result = go(tmp_path / "run", {"lr": 0.1, "epochs": 1, "workers": 0}, allow_change=["lr", "epochs"])
    assert load_recipe(str(result.path / "recipe.yaml")).lr == 0.1


@pytest.mark.slow
def test_a_failed_start_does_not_block_the_corrected_one(tmp_path: Path, die_in_tick: Callable[[int], None]) -> None:
    die_in_tick(1)
    with pytest.raises(Died):
        go(tmp_path / "run", {"lr": 50.0, "epochs": 1})
    assert go(tmp_path / "run", {"epochs": 1}).evaluation.images > 0


@pytest.mark.slow
def test_a_saved_recipe_runs_again_in_a_directory_of_its_own(tmp_path: Path) -> None:
    assert load_recipe(str(go(tmp_path / "run", {"epochs": 1}).path / "recipe.yaml")).output is None


@pytest.mark.slow
def test_the_best_model_is_the_runs_and_the_last_one_is_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = go(tmp_path / "run", {"checkpoint_metric": "loss", "lr": 0.5, "epochs": 3, "keep_best": 1})
    with (result.path / "summary.csv").open() as file:
        losses = [float(row["eval_loss"]) for row in csv.DictReader(file)]
    assert result.evaluation.loss == min(losses)
    assert evaluate_checkpoint(str(result.path), "synthetic:4x8x128").evaluation.loss == pytest.approx(
        min(losses), rel=1e-4
    )
    last = evaluate_checkpoint(f"{result.path}@last", "synthetic:4x8x128").evaluation
    assert last.loss == pytest.approx(losses[-1], rel=1e-4)
    store = Store(result.path / "checkpoints")
    kept = {(store.open(name).manifest.metrics or {})["loss"] for name in store.names()}
    assert kept == {min(losses), losses[-1]}


def test_a_folder_is_the_same_by_another_way_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    then = load_recipe("folder/scratch_32", [f"data_dir={tmp_path / 'photos'}"])
    now = load_recipe("folder/scratch_32", ["data_dir=../photos"])
    assert check_unchanged(tmp_path, then.model_dump(mode="json"), now) == set()


@pytest.mark.slow
def test_data_are_read_from_where_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    starts: list[int] = []
    real = ImageLoader.read

    def read(self: ImageLoader, batch_index: int = 0) -> Any:
        starts.append(batch_index)
        return real(self, batch_index)

    monkeypatch.setattr(ImageLoader, "read", read)
    with pytest.raises(RunStopped):
        go(tmp_path / "run", {"epochs": 1}, max_seconds=0.0)
    go(tmp_path / "run", {"epochs": 1})
    assert starts == [0, 1, 0]  # to train, to go on, to validate


def test_a_restart_by_the_launcher_finds_the_default_directory_of_its_launch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "launch-1")
    recipe = Recipe(**SMALL)
    for name in ("runs/first", "runs/other"):
        Path(name).mkdir(parents=True)
    remember_launch(Path("runs/first"))
    assert with_the_launchs_directory(recipe).output is None, "the first time"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert with_the_launchs_directory(recipe).output == Path("runs/first")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "launch-2")
    assert with_the_launchs_directory(recipe).output is None


def test_of_launches_of_one_name_a_restart_finds_the_last_which_is_not_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "petra-zoo")
    for number, name in enumerate(("runs/b", "runs/c", "runs/a")):
        Path(name).mkdir(parents=True)
        remember_launch(Path(name))
        os.utime(Path(name) / ".launch", (number, number))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert with_the_launchs_directory(Recipe(**SMALL)).output == Path("runs/a")
    go(tmp_path / "runs" / "d", {"epochs": 1})
    assert not (tmp_path / "runs" / "d" / ".launch").exists()


def test_what_was_saved_behind_the_checkpoint_that_a_run_goes_back_to_is_set_aside(
    tmp_path: Path, die_in_tick: Callable[[int], None]
) -> None:
    settings = {"epochs": 3, "keep_last": 3}
    go(tmp_path / "run", settings)
    store = Store(tmp_path / "run" / "checkpoints")
    first, *later = store.names()
    die_in_tick(9)
    with pytest.raises(Died):
        go(tmp_path / "run", {**settings, "lr": 0.01}, resume=str(store.folder / first), allow_change=["lr"])
    assert sorted(path.name for path in store.folder.glob("aside-*")) == [f"aside-{name}" for name in later]
    newest = store.names()[-1]
    assert newest == later[0], "the new branch's"
    assert store.open(newest).manifest.recipe["lr"] == 0.01
    go(tmp_path / "run", {**settings, "lr": 0.01})
    assert [store.open(name).manifest.recipe["lr"] for name in store.names()] == [0.05, 0.01, 0.01]


def test_a_directory_in_which_another_process_trains_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").touch()
    with held_by_this_run(tmp_path / "run"), pytest.raises(UserError, match="already holds a run, in progress"):
        go(tmp_path / "run", {})


def test_somebodys_own_recipe_is_not_taken_for_a_run(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("model: petra_revnet_tiny\n")
    with pytest.raises(UserError, match="already holds a run"):
        go(tmp_path, {})
    assert (tmp_path / "recipe.yaml").read_text() == "model: petra_revnet_tiny\n"


def test_a_run_that_died_between_its_first_model_and_its_first_checkpoint_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(self: Saver, *args: Any, **kwargs: Any) -> None:
        raise Died

    with monkeypatch.context() as patch:
        patch.setattr(Saver, "save", die)
        with pytest.raises(Died):
            go(tmp_path / "run", {})
    assert (tmp_path / "run" / "model.safetensors").exists()
    with pytest.raises(UserError, match="already holds a run"):
        go(tmp_path / "run", {"lr": 0.01})
    go(tmp_path / "run", {})
    go(tmp_path / "undisturbed", {})
    assert not differing(tmp_path / "run", tmp_path / "undisturbed")
