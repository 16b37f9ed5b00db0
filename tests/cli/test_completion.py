"""What a shell completes, through the protocol that the installed script speaks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm

import petra_zoo  # noqa: F401  (importing it registers our models)
from petra_zoo.cli.completion import _values, complete_model, complete_source
from petra_zoo.data.datasets import DATASETS
from petra_zoo.petra import METHODS
from petra_zoo.settings.recipe import Recipe
from petra_zoo.settings.recipe_files import list_recipes
from petra_zoo.training.losses import LOSSES

PROGRAM = "import sys; sys.argv[0] = 'petra-zoo'; from petra_zoo.cli.main import run; run()"
DIGITS = "digits/petra_revnet_tiny"


def ask(*options: str, **environment: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, *options, "-c", PROGRAM],
        capture_output=True,
        text=True,
        timeout=100,
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines() if not options else done.stderr.splitlines()


def bash(*words: str) -> list[str]:
    """What bash offers for the last of the words; it takes KEY=VALUE for three."""
    line = " ".join(["petra-zoo", *words])
    return ask(_PETRA_ZOO_COMPLETE="complete_bash", COMP_WORDS=line, COMP_CWORD=str(len(words)))


def test_commands_and_options() -> None:
    assert bash("tra") == ["train"]
    assert "--save-profile" in bash("plan", "--")


def test_recipes() -> None:
    assert bash("train", "digits/petra_revnet") == [DIGITS]
    assert bash("recipes", "cp", "") == list_recipes()


def test_models() -> None:
    assert bash("info", "petra_revnet_t") == ["petra_revnet_tiny"]
    assert bash("plan", "petra_revnet34_") == [n for n in timm.list_models("petra_revnet34_*") if n != "petra_revnet34"]


def test_names_are_the_registered_ones() -> None:
    """They are read from the sources: what is registered in another way would be missing."""
    assert complete_model("") == sorted(timm.list_models("petra_*"))
    assert complete_source("") == sorted(name for name in timm.list_models() if not name.startswith("petra_"))
    assert _values("method") == sorted(METHODS)
    assert _values("dataset") == sorted(DATASETS)
    assert _values("loss") == sorted(LOSSES)


def test_settings() -> None:
    assert bash("train", DIGITS, "lr_b") == ["lr_base=", "lr_base_size="]
    assert bash("train", DIGITS, "warmup_e") == ["warmup_epochs=", "warmup_epochs=5"]
    assert bash("demo", "amp_d") == ["amp_dtype=", "amp_dtype=bfloat16", "amp_dtype=float16"]
    assert len(bash("train", DIGITS, "epochs", "=", "5", "")) == len(Recipe.model_fields)


@pytest.mark.parametrize("typed", [["=", ""], ["="]])
def test_values(typed: list[str]) -> None:
    assert bash("train", DIGITS, "sync_bn", *typed) == ["true", "false"]
    assert bash("train", DIGITS, "wire_up", *typed) == ["float32", "bfloat16", "null"]
    assert "petra_revnet_tiny" in bash("train", DIGITS, "model", *typed)


def test_the_beginning_of_a_value() -> None:
    assert bash("train", DIGITS, "sched", "=", "co") == ["cosine", "constant"]


def test_zsh_and_fish() -> None:
    line = f"petra-zoo train {DIGITS} balance=m"
    (answer,) = ask(_PETRA_ZOO_COMPLETE="complete_zsh", _TYPER_COMPLETE_ARGS=line)
    assert '"balance=measured"' in answer
    fish = {"_PETRA_ZOO_COMPLETE": "complete_fish", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    assert ask(**fish, _TYPER_COMPLETE_ARGS=line) == ["balance=measured"]


def test_nothing_heavy_is_imported() -> None:
    words = f"petra-zoo train {DIGITS} model = petra"
    account = ask(
        "-X", "importtime", _PETRA_ZOO_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=str(words.count(" "))
    )
    modules = {line.rpartition("|")[2].strip().partition(".")[0] for line in account}
    assert "pydantic" in modules
    assert not modules & {"torch", "timm", "torchvision", "numpy", "huggingface_hub"}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_is_shown_and_installed(shell: str, tmp_path: Path) -> None:
    for option in ("--show-completion", "--install-completion"):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, option, shell],
            capture_output=True,
            text=True,
            timeout=100,
            env=os.environ | {"HOME": str(tmp_path), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"},
        )
        assert done.returncode == 0, done.stderr
        if option == "--show-completion":
            assert "_PETRA_ZOO_COMPLETE" in done.stdout
    assert any("_PETRA_ZOO_COMPLETE" in file.read_text() for file in tmp_path.rglob("*petra-zoo*") if file.is_file())
