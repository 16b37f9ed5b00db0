"""`train --dry-run`: what would be trained, and nothing else."""

from pathlib import Path

import pytest

from petra_zoo.settings.recipe_files import load_recipe
from petra_zoo.training.dry_run import outlook
from tests.cli.test_main import petra_zoo

QUICK = ["dataset=synthetic:4x8x128", "img_size=8", "update_size=64", "workers=0"]


def test_it_says_what_an_update_takes_and_every_class() -> None:
    found = outlook(load_recipe("digits/petra_revnet_tiny", QUICK))
    assert found.updates_per_epoch == 2  # of 128 images
    assert found.recipe.delay == (3.0, 2.0, 1.0, 0.0)
    assert sum(found.train_images.values()) == 128
    assert sorted(found.train_images) == [f"class {i}" for i in range(4)]
    assert sum(found.split) == 14


def test_a_stage_takes_at_least_its_weights_gradients_and_the_optimizers_state() -> None:
    found = outlook(load_recipe("digits/petra_revnet_tiny", QUICK))
    assert found.stage_bytes is not None
    assert len(found.stage_bytes) == 4
    assert sum(found.stage_bytes) > 3 * 4 * found.parameters


def test_what_is_frozen_is_told_apart() -> None:
    found = outlook(load_recipe("digits/petra_revnet_tiny", [*QUICK, "freeze=backbone"]))
    assert 0 < found.trained < found.parameters


def test_the_command_starts_nothing_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = petra_zoo("train", "digits/petra_revnet_tiny", *QUICK, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "D_0 = 3 updates" in done.stdout
    assert done.stdout.startswith("model: petra_revnet_tiny\n")
    assert list(tmp_path.iterdir()) == []


def test_updates_that_end_within_the_warm_up_are_said_before_training() -> None:
    found = outlook(load_recipe("digits/petra_revnet_tiny", [*QUICK, "max_updates=1", "warmup_epochs=1"]))
    said = "\n".join(found.lines())
    assert "warning   max_updates=1 ends within the warm-up, warmup_epochs=1 of 2 updates" in said
    assert "1 update, " in said


def test_a_mistake_is_said_as_training_would_say_it() -> None:
    done = petra_zoo("train", "digits/petra_revnet_tiny", *QUICK, "stages=15", "max_delay=null", "--dry-run")
    assert done.returncode == 2
    assert "does not fit a model of 14 units" in done.stderr
