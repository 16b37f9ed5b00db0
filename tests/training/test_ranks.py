"""What processes settle among themselves beside the training."""

import re
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from petra_zoo.errors import UserError
from petra_zoo.petra import LinkError, Profile, World
from petra_zoo.petra.gather import keep_only
from petra_zoo.settings.recipe import Recipe
from petra_zoo.training.build import open_data, preprocessing_for
from petra_zoo.training.engine import profile_for_run, share_profile
from petra_zoo.training.ranks import average_statistics, held, require_shared, together
from tests.petra.processes import own_world, run_processes
from tests.training.test_train import QUICK

REPLICAS = 2


def validate_first(folder: str, fails: bool) -> str:
    """The first replica leaves a file as the last thing it does while the others are held."""
    world, done = own_world(REPLICAS), Path(folder, "validated")
    try:
        with held(world):
            if world.replica == 0:
                time.sleep(1.0)  # who is not held is there first
                if fails:
                    raise UserError("the disk is full")
                done.touch()
    except (UserError, LinkError) as error:
        return type(error).__name__
    return "held" if done.exists() else "not held"


@pytest.mark.dist
@pytest.mark.slow  # like the others here: two processes import torch
@pytest.mark.timeout(120)
@pytest.mark.parametrize("fails", [False, True])
def test_the_other_replicas_are_held_while_the_first_validates(tmp_path: Path, fails: bool) -> None:
    found = run_processes(REPLICAS, tmp_path, validate_first, str(tmp_path), fails)
    assert found == (["UserError", "LinkError"] if fails else ["held", "held"])


def average(late: int) -> list[float]:
    world = own_world(REPLICAS)
    model = timm.create_model("petra_revnet_tiny", num_classes=4)
    keep_only(model.units(), range(13), torch.device("cpu"))
    model.bn1.running_mean.fill_(float(world.replica))
    if world.replica == late:
        time.sleep(0.5)
    average_statistics(model, world)
    return [float(x) for x in model.bn1.running_mean]


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(120)
def test_statistics_are_averaged_over_replicas_that_meet_first(tmp_path: Path) -> None:
    for row in run_processes(REPLICAS, tmp_path, average, 1):
        assert set(row) == {0.5}


def setting(**settings: Any) -> tuple[Recipe, Any, dict[str, Any]]:
    recipe = Recipe(**QUICK | settings)
    data, _ = open_data(recipe)
    model = timm.create_model("petra_revnet_tiny", num_classes=4)
    return recipe, model, preprocessing_for(recipe, data, model)


def test_one_rank_finds_the_profile_for_all(tmp_path: Path) -> None:
    """The file need not be on the other machines, and cannot differ there."""
    missing = setting(profile=tmp_path / "missing.json")
    for other in (World(rank=1, size=2), World(replica=1, replicas=2)):
        assert profile_for_run(*missing, other) is None
    with pytest.raises(UserError, match="cannot read the profile"):
        profile_for_run(*missing, World(rank=0, size=2))
    measured = profile_for_run(*setting(balance="measured", batch_size=2), World(rank=0, size=2))
    assert isinstance(measured, Profile)
    assert share_profile(measured, World()) is measured
    assert share_profile(None, World()) is None


def read_a_missing_profile(folder: str) -> str:
    world = own_world()
    try:
        together(world, lambda: profile_for_run(*setting(profile=Path(folder, "missing.json")), world))
    except UserError as error:
        return f"{type(error).__name__}: {error}"
    return "went on"


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_profile_that_one_rank_cannot_read_is_an_error_in_every_process(tmp_path: Path) -> None:
    for said in run_processes(2, tmp_path, read_a_missing_profile, str(tmp_path)):
        assert said.startswith(f"SharedError: rank 0 ({socket.gethostname()}): cannot read the profile")


def find_a_mistake(everywhere: bool) -> str:
    world = own_world()

    def look() -> None:
        if everywhere or world.last:
            raise UserError("data folder data does not exist")

    try:
        together(world, look)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_mistake_that_one_process_finds_says_which_and_where(tmp_path: Path) -> None:
    mistake = "data folder data does not exist"
    alone = run_processes(2, tmp_path, find_a_mistake, False)
    assert alone == [f"rank 1 ({socket.gethostname()}): {mistake}"] * 2
    assert run_processes(2, tmp_path, find_a_mistake, True) == [mistake] * 2


def require_a_folder(folder: str) -> str:
    try:
        require_shared(Path(folder), own_world())
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_run_directory_that_cannot_be_written_ends_every_process_in_a_line(tmp_path: Path) -> None:
    for said in run_processes(2, tmp_path, require_a_folder, str(tmp_path / "gone")):
        assert re.search(
            r"^rank 1 .*: cannot write to .*gone: No such file or directory; choose another output=DIR", said
        )
