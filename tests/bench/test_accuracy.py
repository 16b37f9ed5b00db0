"""The accuracy study: a run is what `petra-zoo train` does, and the command line runs and lists it."""

import math
from pathlib import Path

import pytest

from petra_zoo.bench.accuracy import AccuracyStudy
from petra_zoo.bench.accuracy_plan import overrides_of
from petra_zoo.bench.results import Results
from petra_zoo.bench.study_file import load_study
from petra_zoo.errors import Failure
from petra_zoo.training import Reporter, train
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


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(STUDY)
    return path


def test_a_run_is_what_train_does(file: Path, tmp_path: Path) -> None:
    study = AccuracyStudy(load_study(file))
    trial = study.trials(Results("accuracy", "tiny"))[1]
    found = study.run(trial)
    settings = [*overrides_of(trial), f"output={tmp_path / 'run'}"]
    scores = train("digits/petra_revnet_tiny", settings, reporter=Reporter(quiet=True)).evaluation
    assert (found["top1"], found["loss"], found["validation_images"]) == (scores.top1, scores.loss, 20)
    seconds, speed = found["seconds"], found["images_per_second"]
    assert isinstance(seconds, float)
    assert isinstance(speed, float)
    assert seconds * speed == pytest.approx(64)


def test_a_run_that_diverges_tells_no_place_on_this_machine(file: Path) -> None:
    study = AccuracyStudy(load_study(file))
    with pytest.raises(Failure, match=r"not finite|is nan|is inf") as raised:
        study.run(study.trials(Results("accuracy", "tiny"))[2])
    assert "/tmp" not in str(raised.value)


def test_probes_change_no_number_and_are_kept_by_column(file: Path) -> None:
    plain = AccuracyStudy(load_study(file))
    file.write_text(f"{STUDY}probe: 3\n")
    probed = AccuracyStudy(load_study(file))
    trials = [study.trials(Results("accuracy", "tiny"))[1] for study in (plain, probed)]
    first, second = plain.run(trials[0]), probed.run(trials[1])
    assert trials[0].key != trials[1].key
    assert (first["top1"], first["loss"]) == (second["top1"], second["loss"])
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
    assert "wild #0: failed: " in done.stdout
    assert done.stdout.endswith(f"next: petra-zoo report {results}\n")
    assert petra_zoo("report", results).returncode == 0
