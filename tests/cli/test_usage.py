"""A command written wrongly is answered in one line, like every other mistake."""

from pathlib import Path

import pytest

from tests.cli.test_main import petra_zoo


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["train", "digits/petra_revnet_tiny", "--epochs", "3"],
            "settings are written KEY=VALUE, without dashes: epochs=",
        ),
        (["train", "digits/petra_revnet_tiny", "--nprok", "3"], "No such option: --nprok"),
        (["trane"], "No such command 'trane'. Did you mean"),
        (["export", "petra_revnet_tiny.digits"], "Missing option '--output'"),
        (["evaluate", "a", "--batch-size", "0"], "Invalid value for '--batch-size'"),
        (["plan", "petra_revnet_tiny", "--input-size", "8,8"], "expected pixels, such as 224 or 192x256"),
        (["recipes", "ls", "zzz*"], "no recipe matches 'zzz*'"),
        (["train", "zzz"], "unknown recipe 'zzz'; petra-zoo recipes ls lists all"),
        (["train", "digits/petra_revnet_tiny", "zzz=1"], "unknown setting 'zzz'; petra-zoo recipes settings lists all"),
        (["info", "zzz"], "model 'zzz' is unknown; petra-zoo list shows all"),
    ],
)
def test_it_is_one_line(words: list[str], message: str) -> None:
    done = petra_zoo(*words)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("petra-zoo: ")
    assert message in line


def test_a_group_without_a_command_shows_its_help() -> None:
    done = petra_zoo("recipes")
    assert done.returncode == 2
    assert "validate" in done.stdout + done.stderr


def test_a_recipe_is_copied_into_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    done = petra_zoo("recipes", "cp", "digits/petra_revnet_tiny", f"{tmp_path}/mine/")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "mine" / "petra_revnet_tiny.yaml").is_file()
