"""`petra-zoo bench`: the studies, each run by the same engine into a results file that `petra-zoo report` reads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from petra_zoo.cli.output import print_table

if TYPE_CHECKING:
    from petra_zoo.bench.study import Study

app = typer.Typer(
    help="Measure: accuracy, speed, memory and the like. What is in the results file is not repeated.",
    no_args_is_help=True,
)
Output = Annotated[
    Path, typer.Option(metavar="FILE.json", help="The results file; an interrupted study goes on where it stopped.")
]
Jobs = Annotated[int, typer.Option(min=1, help="Runs at once, each in a process with one thread.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="List the runs, and do none.")]


@app.command("accuracy")
def accuracy(
    study: Annotated[
        Path | None,
        typer.Argument(metavar="STUDY.yaml", help="What is compared; default: the methods on digits.", dir_okay=False),
    ] = None,
    output: Output = Path("accuracy.json"),
    jobs: Jobs = 1,
    seeds: Annotated[int | None, typer.Option(min=1, help="Seeds per contender, in place of the study's.")] = None,
    dry_run: DryRun = False,
) -> None:
    """Train contenders with paired seeds: does PETRA lose accuracy?"""
    from petra_zoo.bench.accuracy import AccuracyStudy
    from petra_zoo.bench.study_file import load_study

    _run(AccuracyStudy(load_study(study, seeds=seeds)), output, jobs=jobs, dry_run=dry_run)


def _run(study: Study, output: Path, *, jobs: int = 1, dry_run: bool = False) -> None:
    """Does a study, or lists its runs; says what to do next."""
    from petra_zoo.bench.engine import open_results, run_study

    if dry_run:
        results = open_results(study, output)
        trials = study.trials(results)
        rows = [(t.contender, str(t.repeat), "done" if t in results else "", study.command(t)) for t in trials]
        print_table(("contender", "repeat", "", "command"), rows)
        if more := study.expected(results) - len(trials):
            typer.echo(f"and {more} more, which depend on what comes out of these")
        return
    run_study(study, output, jobs=jobs)
    typer.echo(f"next: petra-zoo report {output}")
