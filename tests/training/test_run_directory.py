"""Where a run is written: never where something else is, never where another run is."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import timm

from petra_zoo.errors import UserError
from petra_zoo.settings.recipe import Recipe
from petra_zoo.settings.recipe_files import load_recipe
from petra_zoo.training import run_directory
from petra_zoo.training.progress import Reporter
from petra_zoo.training.run import train
from petra_zoo.training.run_directory import RunDirectory
from tests.training.test_train import QUICK

RECIPE = Recipe(**QUICK)
RUNS = 6


def test_the_data_of_a_run_is_found_from_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    RunDirectory(Recipe(**QUICK | {"dataset": "folder", "data_dir": "pictures"}, output=tmp_path / "run"), "run")
    assert load_recipe(str(tmp_path / "run" / "recipe.yaml")).data_dir == tmp_path / "pictures"


def test_runs_that_start_in_the_same_second_get_directories_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_directory, "default_path", lambda name: tmp_path / "runs" / f"{name}-20260101-120000")
    with ThreadPoolExecutor(RUNS) as pool:
        made = list(pool.map(lambda _: RunDirectory(RECIPE, "quick"), range(RUNS)))
    suffixes = {directory.path.name.removeprefix("quick-20260101-120000") for directory in made}
    assert suffixes == {"", *(f"-{number}" for number in range(2, RUNS + 1))}
    assert all((directory.path / "recipe.yaml").read_text() for directory in made)


def test_a_directory_that_several_runs_ask_for_is_given_to_one(tmp_path: Path) -> None:
    def claim(_: int) -> str:
        try:
            RunDirectory(RECIPE.model_copy(update={"output": tmp_path / "run"}), "quick")
        except UserError as error:
            return str(error)
        return "mine"

    with ThreadPoolExecutor(RUNS) as pool:
        answers = list(pool.map(claim, range(RUNS)))
    assert answers.count("mine") == 1
    assert sum("already holds a run" in answer for answer in answers) == RUNS - 1


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", ".hidden", "somebody elses.txt"])
def test_a_directory_that_holds_anything_is_refused_before_anything_else_happens(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    recipe = Recipe(**QUICK | {"dataset": "folder", "data_dir": "/nowhere"}, output=tmp_path)
    with pytest.raises(UserError, match=r"already holds something else .*: choose another output=DIR"):
        train(recipe, reporter=Reporter(quiet=True))
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, "mine")]


def test_an_empty_directory_is_taken(tmp_path: Path) -> None:
    assert RunDirectory(RECIPE.model_copy(update={"output": tmp_path}), "quick").path == tmp_path


def test_weights_may_be_read_by_whoever_may_read_the_files_beside_them(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        directory = RunDirectory(RECIPE.model_copy(update={"output": tmp_path / "run"}), "quick")
        directory.save_model(timm.create_model("petra_revnet_tiny", num_classes=4), None, [])
    finally:
        os.umask(before)
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in directory.path.iterdir()}
    assert modes == dict.fromkeys(("recipe.yaml", "config.json", "model.safetensors"), "0o640")
