"""The accuracy study: a run is what `petra-zoo train` does, and the command line runs and lists it."""

import math
from pathlib import Path

import pytest

from petra_zoo.bench.accuracy import AccuracyStudy
from petra_zoo.bench.results import Results
from petra_zoo.bench.study_file import load_study
from petra_zoo.errors import Failure
from petra_zoo.strict_json import JsonObject
from tests.cli.test_main import petra_zoo

STUDY = """
recipe: digits/petra_revnet_tiny
settings: {dataset: "shapes:64x20", batch_size: 16, epochs: 1, workers: 0, img_size: 8, warmup_epochs: 0, stages: 2}
seeds: 1
contenders:
  backprop: {method: backprop, lr: 0.01}
  petra: {paired_with: backprop, lr: 0.01}
  wild: {lr: 1.0e+30}
"""
NOTHING = Results("accuracy", "tiny")  # so far


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(STUDY)
    return path


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> JsonObject:
    """What PETRA's run gives."""
    path = tmp_path_factory.mktemp("study") / "tiny.yaml"
    path.write_text(STUDY)
    study = AccuracyStudy(load_study(path))
    return study.run(study.trials(NOTHING)[1])


def test_a_run_tells_scores_and_speed(plain: JsonObject) -> None:
    assert plain["validation_images"] == 20
    assert plain["parameters"] == 218_986
    numbers = {name: float(str(plain[name])) for name in ("top1", "top5", "loss", "seconds", "images_per_second")}
    assert 0 <= numbers["top1"] <= numbers["top5"] <= 100
    assert numbers["seconds"] * numbers["images_per_second"] == pytest.approx(64)


def test_a_run_that_diverges_tells_no_place_on_this_machine(file: Path) -> None:
    study = AccuracyStudy(load_study(file))
    with pytest.raises(Failure, match=r"not finite|is nan|is inf") as raised:
        study.run(study.trials(NOTHING)[2])
    assert "/tmp" not in str(raised.value)


def test_probes_change_no_number_and_are_kept_by_column(file: Path, plain: JsonObject) -> None:
    file.write_text(f"{STUDY}probe: 3\n")
    study = AccuracyStudy(load_study(file))
    trial = study.trials(NOTHING)[1]
    assert trial.settings["probe"] == 3
    second = study.run(trial)
    assert (plain["top1"], plain["loss"]) == (second["top1"], second["loss"])
    columns = second["probe"]
    assert isinstance(columns, dict)
    assert sorted(columns["micro_batch"]) == [0, 0, 3, 3]
    assert all(math.isfinite(value) for value in columns["cosine"])


def test_the_command_line_lists_the_runs(file: Path, tmp_path: Path) -> None:
    done = petra_zoo("bench", "accuracy", file, "--output", tmp_path / "results.json", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert [line.split("\t")[:2] for line in done.stdout.splitlines()[1:]] == [
        ["backprop", "0"], ["petra", "0"], ["wild", "0"]
    ]  # fmt: skip
    assert "petra-zoo train digits/petra_revnet_tiny dataset=shapes:64x20 batch_size=16" in done.stdout
    assert not (tmp_path / "results.json").exists()


@pytest.mark.slow
def test_the_command_line_runs_a_study_and_says_what_is_next(file: Path, tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    done = petra_zoo("bench", "accuracy", file, "--output", results, "--jobs", "2")
    assert done.returncode == 0, done.stderr
    assert "3/3" in done.stdout
    assert "wild (lr 1e+30, seed 0): failed: " in done.stdout
    assert done.stdout.endswith(f"next: petra-zoo report {results}\n")
    assert petra_zoo("report", results).returncode == 0
