"""The study of pipelines: runs, tables, and processes that train the same network."""

from pathlib import Path

import pytest

from petra_zoo.bench.engine import run_study
from petra_zoo.bench.pipeline import PipelineStudy
from petra_zoo.bench.pipeline_jobs import BASELINE, PipelineJob, PipelineTask
from petra_zoo.bench.pipeline_tables import pipeline_tables
from petra_zoo.bench.results import Results

COMMITTED = Path(__file__).parents[2] / "benchmarks" / "pipeline" / "results.json"


def test_a_trial_says_all_that_its_processes_are_told() -> None:
    job = PipelineJob("1F1B", "speed", 8, PipelineTask(blocks=6), reference_m=4, rounds=3, updates=1)
    assert PipelineJob.of(job.trial) == job


def test_labels_tell_contenders_apart() -> None:
    jobs = [PipelineJob.of(trial) for trial in PipelineStudy().trials(Results("pipeline", "pipeline"))]
    speed = [job.label for job in jobs if job.part == "speed"]
    assert len(set(speed)) == len(speed)
    assert {BASELINE, "1F1B, m=8", "petra, k=4", "petra without links, k=8"} <= set(speed)


def test_the_committed_results_are_of_the_study_as_it_is() -> None:
    results = Results.read(COMMITTED)
    assert all(trial in results for trial in PipelineStudy().trials(results))


def test_tables_leave_out_what_was_not_run() -> None:
    results, some = Results.read(COMMITTED), Results("pipeline", "pipeline")
    for run in results.runs:
        if run.contender in (BASELINE, "petra") and run.settings["part"] == "speed":
            some.add(run)
    tables = pipeline_tables(some)
    assert tables.keys() == {"speed", "summary", "targets"}
    assert tables["targets"].splitlines()[2:] == [
        "| petra over capacity | >= 0.85 | 0.863 |",
        "| petra over its ideal, 0.875 of capacity | >= 0.985 | 0.986 |",
    ]


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(600)
def test_the_quick_study_runs_to_its_end(tmp_path: Path) -> None:
    results = run_study(PipelineStudy.small(), tmp_path / "results.json")
    assert all(not run.failed for run in results.runs)
    assert {"speed", "summary", "targets", "plan"} == pipeline_tables(results).keys()
    splits = {run.contender: run.result["split"] for run in results.runs if run.settings["part"] == "speed"}
    assert (splits["petra"], splits["1F1B"]) == ([3, 5], [4, 4])
