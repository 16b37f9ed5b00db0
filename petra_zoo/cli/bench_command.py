"""`petra-zoo bench`: the studies, each run by the same engine into a results file that `petra-zoo report` reads."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from petra_zoo.cli.output import print_lines, print_table

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
Quick = Annotated[bool, typer.Option("--quick", help="A small one, to see that it works; its numbers say nothing.")]
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


@app.command("memory")
def memory(output: Output = Path("memory.json"), jobs: Jobs = 1, quick: Quick = False, dry_run: DryRun = False) -> None:
    """Count the peak live bytes of a training step against depth: stored, recomputed, reversible."""
    from petra_zoo.bench.memory import MemoryStudy
    from petra_zoo.bench.steps import left_out

    print_lines(left_out())
    _run(MemoryStudy.small() if quick else MemoryStudy(), output, jobs=jobs, dry_run=dry_run)


@app.command("speed")
def speed(output: Output = Path("speed.json"), quick: Quick = False, dry_run: DryRun = False) -> None:
    """Time a training step on one core, stored, recomputed and reversible; and the training of whole recipes."""
    from petra_zoo.bench.speed import SpeedStudy
    from petra_zoo.bench.steps import left_out

    print_lines(left_out())
    _run(SpeedStudy.small() if quick else SpeedStudy(), output, dry_run=dry_run)


@app.command("pipeline")
def pipeline(output: Output = Path("pipeline.json"), quick: Quick = False, dry_run: DryRun = False) -> None:
    """Time PETRA on two processes beside torch's pipelines and DDP, and count what they hold."""
    from petra_zoo.bench.pipeline import PipelineStudy

    _run(PipelineStudy.small() if quick else PipelineStudy(), output, dry_run=dry_run)


@app.command("faults")
def faults(output: Output = Path("faults.json"), quick: Quick = False, dry_run: DryRun = False) -> None:
    """Kill, freeze, stop and spoil runs, damage checkpoints, fuzz files: what is survived, what is lost?"""
    from petra_zoo.bench.faults import FaultStudy

    _run(FaultStudy.small() if quick else FaultStudy(), output, dry_run=dry_run)


@app.command("conversion")
def conversion(
    output: Output = Path("conversion.json"), jobs: Jobs = 1, quick: Quick = False, dry_run: DryRun = False
) -> None:
    """Convert ResNets: couplings, errors and memory of large ones, fidelity of small trained ones."""
    from petra_zoo.bench.conversion import ConversionStudy

    _run(ConversionStudy.small() if quick else ConversionStudy(), output, jobs=jobs, dry_run=dry_run)


@app.command("finetune")
def finetune(
    output: Output = Path("finetune.json"), jobs: Jobs = 1, quick: Quick = False, dry_run: DryRun = False
) -> None:
    """Fine-tune a small transformer, plain, checkpointed and converted: accuracy, and the peak of a step."""
    from petra_zoo.bench.finetuning import FinetuningStudy

    _run(FinetuningStudy.small() if quick else FinetuningStudy(), output, jobs=jobs, dry_run=dry_run)


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
    typer.echo(f"next: petra-zoo report {shlex.quote(str(output))}")
