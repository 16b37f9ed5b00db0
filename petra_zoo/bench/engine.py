"""The engine of all studies: does the runs that are missing, and keeps each result as soon as it is there."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from petra_zoo.bench.progress import Progress
from petra_zoo.bench.results import Results, claimed
from petra_zoo.bench.study import Study, Trial
from petra_zoo.bench.workers import Workers
from petra_zoo.errors import UserError


def run_study(study: Study, path: Path, *, jobs: int = 1, console: Console | None = None) -> Results:
    """Does the runs of a study that a results file does not have yet.

    The file is written, whole, after every run, so an interrupted study goes on where it stopped.

    Args:
        study: what is compared.
        path: the results file, absent or of the same study.
        jobs: worker processes with one thread each, so many runs at once.
        console: where progress is told.

    Returns:
        All results, the file's older ones included.

    Raises:
        UserError: the file is of another study, or broken, and stays as it is; or a run cannot be done.
        Failure: a run ended as nobody expected.
        KeyboardInterrupt: after the workers have ended; what is done is kept.
    """
    if jobs > 1 and not study.shares_the_machine:
        raise UserError(f"jobs={jobs}: {study.name} measures time, so its runs go one after the other: use jobs=1")
    with claimed(path):
        results = open_results(study, path)
        with Progress(study, results, path, console) as progress, Workers(study, jobs) as workers:
            while True:
                for trial in missing(study, results, workers.in_flight)[: workers.free]:
                    workers.start(trial)
                    progress.began(trial)
                if not workers.in_flight:
                    break
                run = workers.wait()
                results.add(run)
                results.write(path)
                progress.ended(run)
        if results.runs:  # what a study says about itself may be newer than its runs
            results.write(path)
    return results


def missing(study: Study, results: Results, in_flight: list[Trial]) -> list[Trial]:
    """The runs that are still to be begun, in the study's order."""
    begun = {trial.key for trial in in_flight}
    return [trial for trial in study.trials(results) if trial not in results and trial.key not in begun]


def open_results(study: Study, path: Path) -> Results:
    """The results that a study goes on from: those in the file, or none yet.

    Raises:
        UserError: the file is of another study, or no results file.
    """
    if not path.exists():
        return Results(study.kind, study.name, study.about())
    results = Results.read(path)
    if (results.kind, results.study) != (study.kind, study.name):
        raise UserError(
            f"{path} holds the study '{results.study}' ({results.kind}), not '{study.name}' ({study.kind}): "
            "choose another --output"
        )
    results.about = study.about()
    return results
