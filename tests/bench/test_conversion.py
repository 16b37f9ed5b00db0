"""The study of conversions."""

from pathlib import Path

import pytest

from petra_zoo.bench.conversion import ConversionStudy
from petra_zoo.bench.conversion_jobs import FidelityJob, TrainedOn, TransformerJob, job_of
from petra_zoo.bench.conversion_tables import conversion_tables
from petra_zoo.bench.engine import run_study
from petra_zoo.bench.results import Results

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize("coupling", ["auto", 1.0])
def test_a_trial_says_what_is_converted(coupling: float) -> None:
    job = FidelityJob(TrainedOn("digits", 8, 12, 0.0), 2, coupling, True, 1e-4)
    assert job_of(job.trial) == job


def test_a_trial_says_which_transformer_is_converted_and_how() -> None:
    job = TransformerJob(TrainedOn("digits", 8, 12, 0.0), 1, 0.25, "bits", 1e-4)
    assert job_of(job.trial) == job


def test_the_committed_results_are_of_the_study_as_it_is() -> None:
    results = Results.read(BENCHMARKS / "conversion" / "results.json")
    assert all(trial in results for trial in ConversionStudy().trials(results))


@pytest.mark.slow
def test_the_quick_study_runs_to_its_end(tmp_path: Path) -> None:
    results = run_study(ConversionStudy.small(), tmp_path / "results.json")
    networks = results.runs[:2]
    # The same network as ever: its weights come from a seed.
    assert networks[1].number("largest_error") == pytest.approx(5.2e-7, rel=0.2)
    assert conversion_tables(results).keys() == {"networks", "fidelity", "transformers"}
