"""`petra-zoo recipes`: listing, showing, copying."""

import json
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from petra_zoo.cli.recipes_command import app
from petra_zoo.errors import UserError
from petra_zoo.settings.recipe_files import list_recipes, load_recipe

DIGITS = "digits/petra_revnet_tiny"


def run(*arguments: str) -> str:
    result: Result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_ls_prints_one_name_per_line_in_a_pipe() -> None:
    assert run("ls").splitlines() == list_recipes()


def test_ls_takes_a_pattern() -> None:
    assert all(name.startswith("shapes/") for name in run("ls", "shapes/*").splitlines())
    with pytest.raises(UserError, match=r"no recipe matches 'nothing\*'"):
        run("ls", "nothing*")


def test_ls_gives_json() -> None:
    rows = {row["name"]: row for row in json.loads(run("ls", "--json"))}
    assert rows[DIGITS]["model"] == "petra_revnet_tiny"
    assert rows[DIGITS]["method"] == "petra"


def test_ls_draws_a_table_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes any output for a terminal
    monkeypatch.setenv("COLUMNS", "120")
    output = run("ls")
    assert "epochs" in output
    assert DIGITS in output


def test_show_prints_the_file_with_its_comments() -> None:
    output = run("show", DIGITS)
    assert output.startswith("#")
    assert "petra-zoo train digits/petra_revnet_tiny" in output


def test_show_can_print_what_a_recipe_comes_to(tmp_path: Path) -> None:
    name = "cifar10/petra_revnet18_cifar"
    assert "extends: paper/cifar10" in run("show", name)
    (tmp_path / "resolved.yaml").write_text(run("show", name, "--resolved"))
    assert load_recipe(str(tmp_path / "resolved.yaml")) == load_recipe(name)


def test_show_of_an_unknown_recipe_is_a_user_error() -> None:
    with pytest.raises(UserError, match="unknown recipe"):
        run("show", "digits/nothing")


def test_cp_makes_folders_and_a_recipe_that_loads(tmp_path: Path) -> None:
    target = tmp_path / "new" / "own.yaml"
    assert run("cp", DIGITS, str(target)).strip() == str(target)
    assert load_recipe(str(target)) == load_recipe(DIGITS)


def test_cp_into_a_folder_keeps_the_name(tmp_path: Path) -> None:
    run("cp", DIGITS, str(tmp_path))
    assert (tmp_path / "petra_revnet_tiny.yaml").exists()


def test_cp_gives_a_name_without_ending_that_of_a_recipe(tmp_path: Path) -> None:
    written = run("cp", DIGITS, str(tmp_path / "mine.v2")).strip()
    assert written == str(tmp_path / "mine.v2.yaml")
    assert load_recipe(written) == load_recipe(DIGITS)


def test_cp_overwrites_only_when_forced(tmp_path: Path) -> None:
    target = tmp_path / "own.yaml"
    target.write_text("mine")
    with pytest.raises(UserError, match="exists; choose another name, or overwrite it with --force"):
        run("cp", DIGITS, str(target))
    assert target.read_text() == "mine"
    run("cp", DIGITS, str(target), "--force")
    assert target.read_text() != "mine"


def test_validate_says_ok_for_every_recipe_that_trains() -> None:
    assert run("validate", "digits/petra_revnet*", "method=dsp") == f"ok      {DIGITS}\n"


def test_validate_tells_the_reason_and_exits_with_1() -> None:
    result = CliRunner().invoke(app, ["validate", "digits/petra_revnet*", "stages=15", "batch_size=32"])
    assert result.exit_code == 1
    assert result.output == f"failed  {DIGITS}: stages=15 does not fit a model of 14 units: choose 1 to 14\n"


def test_validate_tells_whether_the_stages_can_be_spread_over_processes() -> None:
    result = CliRunner().invoke(app, ["validate", "digits/*", "--nproc", "5"])
    assert result.exit_code == 1
    assert "5 processes for 4 stages: launch 1 to 4" in result.output


def test_validate_gives_json() -> None:
    result = CliRunner().invoke(app, ["validate", "digits/petra_revnet*", "stages=15", "batch_size=32", "--json"])
    assert result.exit_code == 1
    (verdict,) = json.loads(result.output)
    assert (verdict["recipe"], verdict["ok"]) == (DIGITS, False)
    assert verdict["reason"].startswith("stages=15 does not fit")
