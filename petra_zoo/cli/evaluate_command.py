"""`petra-zoo evaluate`: accuracy of a run or model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from petra_zoo.training.checkpoint_evaluation import evaluate_checkpoint, write_results


def evaluate(
    source: Annotated[
        str, typer.Argument(metavar="RUN_OR_MODEL", help="A run directory, hf-hub:ORG/NAME, or a pretrained model.")
    ],
    dataset: Annotated[
        str | None, typer.Option(help="digits, shapes, cifar10, folder, ...; default: what the run was trained on.")
    ] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Where the data set's files are.")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 256,
    workers: Annotated[int, typer.Option(min=0)] = 0,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: the GPU where there is one.")] = None,
    amp: Annotated[bool, typer.Option("--amp", help="bfloat16 autocast.")] = False,
    on_bad_image: Annotated[
        Literal["fail", "skip"], typer.Option(help="Stop at an unreadable image, or put the next one in its place.")
    ] = "fail",
    results_file: Annotated[Path | None, typer.Option(help="Write timm's results CSV.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Evaluate a trained model: top-1, top-5, loss, and the classes it mistakes most."""
    report = evaluate_checkpoint(
        source,
        dataset,
        data_dir=data_dir,
        batch_size=batch_size,
        workers=workers,
        device=device,
        amp=amp,
        on_bad_image=on_bad_image,
    )
    if results_file is not None:
        write_results(results_file, [report])
    if as_json:
        typer.echo(json.dumps(report.as_dict(), indent=2))
        return
    result = report.evaluation
    typer.echo(f"{report.model} on {report.dataset}: {result.images} images")
    typer.echo(f"  top-1  {result.top1:.2f} %")
    typer.echo(f"  top-5  {result.top5:.2f} %")
    typer.echo(f"  loss   {result.loss:.4f}")
    if report.bad_images:
        typer.echo(f"  {report.bad_images} unreadable images skipped")
    for row in result.worst_classes(report.class_names):
        taken = f", taken for {row['taken_for']} {row['times']} times"
        typer.echo(f"  worst  {row['class']}: {row['accuracy']:.1f} % of {row['images']}{taken}")
