"""Runs as they lie on disk: in a table and in a picture."""

import fcntl
import json
import os
from pathlib import Path
from typing import get_type_hints

import pytest
from PIL import Image

from petra_zoo.checkpoints.provenance import ENVIRONMENT, EVALUATION
from petra_zoo.cli.runs_command import runs
from petra_zoo.errors import UserError
from petra_zoo.settings.recipe_files import load_recipe, save_recipe
from petra_zoo.training.progress import Reporter
from petra_zoo.training.run import train
from petra_zoo.training.run_lock import LOCK
from petra_zoo.training.run_plot import Curves, plot_runs
from petra_zoo.training.runs import SortKey, list_runs
from tests.cli.test_main import petra_zoo
from tests.hub.checkpoints import QUICK


def write_run(path: Path, *top1: float, finished: bool = True, settings: tuple[str, ...] = (), log: int = 0) -> Path:
    """A run as `train` leaves it, without having trained."""
    path.mkdir(parents=True)
    save_recipe(
        load_recipe("digits/petra_revnet_tiny", [f"epochs={max(1, len(top1))}", *settings]), path / "recipe.yaml"
    )
    if top1:
        rows = [f"{epoch},{2 / epoch},{1 / epoch},{value},99,0.1" for epoch, value in enumerate(top1, 1)]
        (path / "summary.csv").write_text(
            "\n".join(["epoch,train_loss,eval_loss,eval_top1,eval_top5,lr", *rows]) + "\n"
        )
    lines = [
        {"event": "train", "epoch": 1 + (update - 1) // 10, "update": update, "loss": 1.0, "top1": 50.0, "lr": 0.1,
         "images_per_second": 100.0}
        for update in range(5, 5 * log + 1, 5)
    ]  # fmt: skip
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if finished:
        (path / ENVIRONMENT).write_text(json.dumps({"wall_seconds": 90.4}))
        (path / EVALUATION).write_text("{}")
    return path


def test_a_run_is_told_by_its_files(tmp_path: Path) -> None:
    write_run(tmp_path / "group" / "a", 80.0, 90.0, 85.0)
    (found,) = list_runs(tmp_path)
    assert (found.run, found.model, found.dataset) == ("group/a", "petra_revnet_tiny", "digits")
    assert (found.best, found.last, found.epochs, found.of_epochs) == (90.0, 85.0, 3, 3)
    assert (found.seconds, found.state) == (90.4, "finished")
    assert list_runs(tmp_path / "group" / "a")[0].run == "a"


def test_a_run_without_anything_to_go_on_from_has_failed(tmp_path: Path) -> None:
    write_run(tmp_path / "a", finished=False)
    (found,) = list_runs(tmp_path)
    assert (found.state, found.best, found.seconds, found.epochs) == ("failed", None, None, 0)


def test_a_run_in_progress_is_running_and_not_disturbed(tmp_path: Path) -> None:
    path = write_run(tmp_path / "a", 50.0, finished=False)
    descriptor = os.open(path / LOCK, os.O_CREAT | os.O_RDWR)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    assert [list_runs(tmp_path)[0].state for _ in range(2)] == ["running", "running"]
    os.close(descriptor)
    assert list_runs(tmp_path)[0].state == "failed"


def test_a_recipe_that_cannot_be_read_hides_no_other_run(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "recipe.yaml").write_text("")
    write_run(tmp_path / "b", 50.0)
    assert [(run.run, run.model) for run in list_runs(tmp_path, "run")] == [("a", None), ("b", "petra_revnet_tiny")]


@pytest.mark.parametrize(
    ("key", "order"), [("best", "bca"), ("last", "cba"), ("run", "abc"), ("epochs", "bca"), ("stages", "cab")]
)
def test_runs_are_sorted_by_any_column_and_what_is_unknown_comes_last(tmp_path: Path, key: str, order: str) -> None:
    write_run(tmp_path / "a", settings=("stages=3",))
    write_run(tmp_path / "b", 95.0, 60.0, settings=("stages=5",))
    write_run(tmp_path / "c", 70.0, settings=("stages=2",))
    assert "".join(run.run for run in list_runs(tmp_path, key)) == order  # type: ignore[arg-type]


def test_a_folder_without_runs_and_one_that_is_not_there_are_said(tmp_path: Path) -> None:
    assert f"no runs in {tmp_path}" in petra_zoo("runs", tmp_path).stderr
    assert json.loads(petra_zoo("runs", tmp_path, "--json").stdout) == []
    done = petra_zoo("runs", tmp_path / "nowhere")
    assert (done.returncode, "there is no folder" in done.stderr) == (2, True)


def test_the_command_says_the_same_to_a_person_and_to_a_program(tmp_path: Path) -> None:
    write_run(tmp_path / "a", 80.0, 90.0)
    (row,) = json.loads(petra_zoo("runs", tmp_path, "--json").stdout)
    assert (row["run"], row["best"], row["state"]) == ("a", 90.0, "finished")
    line = petra_zoo("runs", tmp_path).stdout.splitlines()[1].split("\t")
    assert line[0] == "a"
    assert line[4:] == ["2/2", "90.00", "90.00", "1:30 min", "finished"]


def test_the_keys_to_sort_by_are_those_of_the_command() -> None:
    assert get_type_hints(runs)["sort"] == SortKey


def test_curves_stand_at_the_epochs_they_belong_to(tmp_path: Path) -> None:
    curves = Curves.of(write_run(tmp_path / "a", 80.0, 90.0, log=4))
    assert curves.training["top1"] == [(0.5, 50.0), (1.0, 50.0), (1.5, 50.0), (2.0, 50.0)]
    assert curves.validation["top1"] == [(1.0, 80.0), (2.0, 90.0)]


def test_epochs_too_short_for_the_log_have_the_curves_of_whole_epochs(tmp_path: Path) -> None:
    curves = Curves.of(write_run(tmp_path / "a", 80.0, 90.0))
    assert curves.training["loss"] == [(1.0, 2.0), (2.0, 1.0)]
    assert curves.training["images_per_second"] == []


def test_lines_of_epochs_shorter_than_the_log_interval_stand_at_their_epochs(tmp_path: Path) -> None:
    path = write_run(tmp_path / "a", 80.0, 90.0, 95.0, settings=("epochs=null", "max_updates=100"))
    lines = [
        {"event": "validation", "epoch": 1, "update": 45},
        {"event": "validation", "epoch": 2, "update": 90},
        {"event": "train", "epoch": 3, "update": 99, "lr": 0.1, "images_per_second": 9.0},
        {"event": "validation", "epoch": 3, "update": 100},
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    curves = Curves.of(path)
    assert curves.training["images_per_second"] == [(2.2, 9.0)]
    assert [place for place, _ in curves.validation["top1"]] == [1.0, 2.0, 100 / 45]
    assert [place for place, _ in curves.training["lr"]] == [1.0, 2.0, 100 / 45]


def test_an_epoch_that_cuts_a_window_of_updates_is_a_whole_one(tmp_path: Path) -> None:
    path = write_run(tmp_path / "a", 80.0, 90.0)
    lines = [{"event": "validation", "epoch": epoch, "update": 5 * epoch // 2} for epoch in (1, 2)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [place for place, _ in Curves.of(path).validation["top1"]] == [1.0, 2.0]


def test_a_run_of_updates_says_how_many_it_has_made(tmp_path: Path) -> None:
    write_run(tmp_path / "a", 80.0, 90.0, settings=("epochs=null", "max_updates=60"), log=3)
    (row,) = json.loads(petra_zoo("runs", tmp_path, "--json").stdout)
    assert (row["of_epochs"], row["updates"], row["of_updates"]) == (None, 15, 60)
    assert "\t2 (15/60 updates)\t" in petra_zoo("runs", tmp_path).stdout


@pytest.mark.parametrize("damage", ["epoch,train_loss\nx,1\n", "epoch,train_loss\n3", "\0", "[]\nnull\n"])
def test_a_damaged_log_is_passed_over(tmp_path: Path, damage: str) -> None:
    path = write_run(tmp_path / "a", log=2)
    (path / "summary.csv").write_text(damage)
    with (path / "metrics.jsonl").open("a") as file:
        file.write(damage)
    assert len(Curves.of(path).training["loss"]) == 2
    assert list_runs(tmp_path)[0].epochs == 0


def test_a_line_that_is_being_written_is_left_out(tmp_path: Path) -> None:
    path = write_run(tmp_path / "a", log=2)
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"event": "train", "ep')
    assert len(Curves.of(path).training["loss"]) == 2


def test_several_runs_are_drawn_into_one_picture(tmp_path: Path) -> None:
    plot_runs([write_run(tmp_path / name, 80.0, 90.0, log=4) for name in ("a", "b/run", "c/run")], tmp_path / "p.png")
    with Image.open(tmp_path / "p.png") as picture:
        assert picture.width > 1000


def test_what_is_no_run_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no run"):
        Curves.of(tmp_path / "nowhere")
    with pytest.raises(UserError, match="has logged nothing yet"):
        Curves.of(tmp_path)


@pytest.mark.slow
def test_a_real_run_is_listed_and_drawn(tmp_path: Path) -> None:
    settings = [*QUICK, "epochs=2", "log_interval=1", f"output={tmp_path / 'run'}"]
    train(load_recipe("digits/petra_revnet_tiny", settings), reporter=Reporter(quiet=True))
    (found,) = list_runs(tmp_path)
    assert (found.state, found.epochs, found.dataset) == ("finished", 2, "synthetic:4x8x128")
    assert petra_zoo("plot", tmp_path / "run", "--output", tmp_path / "p.png").returncode == 0


def test_a_folder_of_images_goes_by_its_own_name(tmp_path: Path) -> None:
    write_run(tmp_path / "a", 80.0, settings=("dataset=folder", "data_dir=pictures/birds"))
    assert "\tbirds/\t" in petra_zoo("runs", tmp_path).stdout
