"""The study of fine-tuning."""

from pathlib import Path

import pytest

from petra_zoo.bench.engine import run_study
from petra_zoo.bench.finetuning import FinetuningStudy, finetuning_tables
from petra_zoo.bench.finetuning_jobs import tuning_job
from petra_zoo.bench.results import Record, Results

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_a_trial_says_what_is_fine_tuned() -> None:
    for trial in FinetuningStudy.small().trials(Results("finetune", "quick")):
        assert tuning_job(trial).trial == trial


def test_differences_are_taken_pair_by_pair() -> None:
    study, results = FinetuningStudy(seeds=(0, 1), rates=(("all", 1e-3),)), Results("finetune", "finetune")
    for trial in study.trials(results):
        top1 = 90.0 + trial.repeat + (0.5 if trial.contender.startswith("reversible") else 0.0)
        results.add(Record(trial.contender, trial.repeat, trial.settings, "", {"top1": top1, "peak_bytes": 2048}))
    lines = finetuning_tables(results)["finetuning"].splitlines()
    assert lines[2] == "| all | plain | 2 | 90.50 (90.00 to 91.00) | | 2.0 | 1.00 |"
    assert lines[4] == "| all | reversible | 2 | 91.00 (90.50 to 91.50) | 0.50 (0.50 to 0.50) | 2.0 | 1.00 |"


def test_the_committed_results_are_of_the_study_as_it_is() -> None:
    results = Results.read(BENCHMARKS / "finetune" / "results.json")
    assert all(trial in results for trial in FinetuningStudy().trials(results))


@pytest.mark.slow
def test_the_quick_study_runs_to_its_end(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    results = run_study(FinetuningStudy.small(), tmp_path / "results.json")
    found = {run.contender: run.number("peak_bytes") for run in results.runs}
    assert len(found) == 6
    assert found["reversible, all"] < found["plain, all"]
