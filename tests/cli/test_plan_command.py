"""`petra-zoo plan` as a user meets it."""

import builtins
import json
from pathlib import Path
from typing import Any

import pytest

from petra_zoo.petra import Profile
from petra_zoo.planning.schedules import all_schedules
from tests.cli.test_main import petra_zoo

QUICK = ("--batch-size", "2", "--input-size", "8", "--device", "cpu")


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plan") / "profile.json"
    done = petra_zoo("plan", "petra_revnet_tiny", *QUICK, "--save-profile", path)
    assert done.returncode == 0, done.stderr
    for word in (*all_schedules(), "micro-batches of 2 images of 3x8x8", "on 8 devices", "images/s by devices"):
        assert word in done.stdout
    return path


def test_a_saved_profile_gives_json_with_every_link_and_device(profile: Path) -> None:
    done = petra_zoo("plan", "petra_revnet_tiny", "--profile", profile, "--devices", 4, "--memory", "1kB", "--json")
    plan = json.loads(done.stdout)
    assert [p["method"] for p in plan["predictions"]] == list(all_schedules())
    petra = plan["predictions"][0]
    assert (petra["devices"], petra["stages"], len(petra["links"]), len(petra["memory"])) == (4, 4, 3, 4)
    assert petra["delay"] == [0.75, 0.5, 0.25, 0]
    assert "needs" in petra["rejected"]
    assert [p["devices"] for p in plan["curves"]["petra"]] == [1, 2, 4, 8, 16, 32, 64]
    assert Profile.from_json(json.dumps(plan["profile"])) == Profile.load(profile)


def test_the_number_of_devices_asked_for_joins_the_curve(profile: Path) -> None:
    done = petra_zoo("plan", "petra_revnet_tiny", "--profile", profile, "--devices", 6)
    assert "method\t1\t2\t4\t6\t8\t16\t32\t64" in done.stdout


def test_a_delay_that_costs_accuracy_is_warned_of_with_what_to_do(profile: Path) -> None:
    done = petra_zoo("plan", "petra_revnet_tiny", "--profile", profile, "--devices", 8, "--micro-batches", 1)
    (warning,) = [line for line in done.stdout.splitlines() if line.startswith("warning: ")]
    assert warning.startswith("warning: petra, dsp, delayed: D_0 = 14 updates, and above 2 (muon: 3) training is")
    assert warning.endswith("more and smaller --micro-batches of the same update, or fewer devices")
    done = petra_zoo("plan", "petra_revnet_tiny", "--profile", profile, "--devices", 4, "--micro-batches", 3)
    assert "warning" not in done.stdout, "2 updates are the border"
    assert "\t2\t" in next(line for line in done.stdout.splitlines() if line.startswith("petra\t"))


def test_the_plot_is_written(profile: Path, tmp_path: Path) -> None:
    path = tmp_path / "plan.png"
    done = petra_zoo("plan", "petra_revnet_tiny", "--profile", profile, "--plot", path, "--memory", "1MB")
    assert done.returncode == 0, done.stderr
    assert path.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_plot_says_what_to_install(
    profile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def missing(name: str, *arguments: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *arguments, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    done = petra_zoo("plan", "petra_revnet_tiny", "--profile", profile, "--plot", tmp_path / "plan.png")
    assert done.returncode == 2
    assert "pip install 'petra-zoo[plots]'" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["petra_revnet_tinny"], "nearest: petra_revnet_tiny"),
        (["resnet18"], "ResNet has no units(): petra-zoo convert"),
        (["petra_revnet_tiny", "--bandwidth", "10GB"], "--bandwidth '10GB': the unit 'GB' is unknown"),
        (["petra_revnet_tiny", "--latency", "10"], "--latency '10': the unit is missing"),
        (["petra_revnet_tiny", "--memory", "lots"], "--memory 'lots' is not a number with a unit"),
        (["petra_revnet_tiny", "--profile", "missing.json"], "cannot read the profile missing.json"),
        (["petra_revnet_tiny", "--devices", "0"], "--devices"),
        (["petra_revnet18", "--profile", "PROFILE"], "was measured with model revnet_tiny, not revnet18"),
        (["petra_revnet_tiny", "--profile", "PROFILE", "--batch-size", "64"], "batch size 2, not 64"),
        (["petra_revnet_tiny", "--profile", "PROFILE", "--plot", "plan.txt"], "cannot write the plot plan.txt"),
        (["petra_revnet18", "--input-size", "8"], "too small"),
    ],
)
def test_bad_use_is_one_clear_line(
    arguments: list[str], message: str, profile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = petra_zoo("plan", *(str(profile) if argument == "PROFILE" else argument for argument in arguments))
    assert done.returncode == 2, done.stdout
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
