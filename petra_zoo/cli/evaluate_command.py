"""`petra-zoo evaluate`: accuracy of runs or models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from petra_zoo.cli.completion import complete_model
from petra_zoo.strict_json import Json, to_json
from petra_zoo.wording import counted

if TYPE_CHECKING:
    from petra_zoo.evaluation.checkpoint_evaluation import EvaluationReport
    from petra_zoo.evaluation.comparison import Comparison


def evaluate(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN_OR_MODEL...",
            help="Runs (RUN@last: the last model, not the best), hf-hub:ORG/NAME[@REVISION], or pretrained models.",
            autocompletion=complete_model,
        ),
    ],
    dataset: Annotated[
        list[str] | None,
        typer.Option(help="digits, shapes, cifar10, folder, ...; repeatable; default: what the run was trained on."),
    ] = None,
    data_dir: Annotated[
        list[Path] | None, typer.Option(help="Where the data set's files are; one for all, or one for each.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 256,
    retry: Annotated[bool, typer.Option("--retry", help="Halve the batch size where memory runs out.")] = False,
    workers: Annotated[int, typer.Option(min=0)] = 0,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: the GPU where there is one.")] = None,
    amp: Annotated[bool, typer.Option("--amp", help="bfloat16 autocast.")] = False,
    on_bad_image: Annotated[
        Literal["fail", "skip"], typer.Option(help="Stop at an unreadable image, or leave it out.")
    ] = "fail",
    compared: Annotated[bool, typer.Option("--compare", help="Compare two models: agreement, McNemar's test.")] = False,
    tta: Annotated[
        bool, typer.Option("--tta", help="Average the probabilities of each image and its mirror image.")
    ] = False,
    use_train_size: Annotated[
        bool, typer.Option("--use-train-size", help="Ignore a checkpoint's test_input_size and test_crop_pct.")
    ] = False,
    cache_dir: Annotated[Path | None, typer.Option(help="Where downloads are kept; default: HF_HUB_CACHE.")] = None,
    results_file: Annotated[Path | None, typer.Option(help="Write timm's results CSV, and the peak memory.")] = None,
    csv: Annotated[
        Path | None, typer.Option("--csv", metavar="FILE.csv", help="Write each class's precision, recall, support.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw the confusion matrix.")] = None,
    mistakes: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw the images of the surest mistakes.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Evaluate trained models: top-1, top-5, loss, calibration, memory, and the classes they mistake most.

    The calibration error is how far a model's confidence is from its accuracy, in
    percent, over 15 bins of confidence.
    """
    datasets = dataset or []
    if compared and len(sources) != 2:
        raise typer.BadParameter(f"--compare takes two models, not {len(sources)}")
    if compared and len(datasets) > 1:
        raise typer.BadParameter(f"--compare takes one data set, not {len(datasets)}")
    if mistakes and len(sources) * max(1, len(datasets)) > 1:
        raise typer.BadParameter("--mistakes takes one model and one data set")
    from petra_zoo.data.contact_sheet import check_picture
    from petra_zoo.evaluation.checkpoint_evaluation import EvaluationOptions, evaluate_checkpoints
    from petra_zoo.evaluation.class_scores import draw_confusion, write_class_scores
    from petra_zoo.evaluation.comparison import compare
    from petra_zoo.evaluation.mistakes import save_mistakes
    from petra_zoo.figures import check_figure
    from petra_zoo.files import check_writable

    for path in filter(None, (results_file, csv)):
        check_writable(path)
    if plot:
        check_figure(plot)
    if mistakes:
        check_picture(mistakes)
    options = EvaluationOptions(
        batch_size=batch_size,
        retry=retry,
        workers=workers,
        device=device,
        amp=amp,
        on_bad_image=on_bad_image,
        use_train_size=use_train_size,
        fingerprints=compared,
        tta=tta,
        progress=True,
    )
    reports = []
    for report in evaluate_checkpoints(
        sources, dataset, results_file=results_file, data_dir=data_dir, cache_dir=cache_dir, options=options
    ):
        reports.append(report)
        if not as_json:
            _show(report)
    if csv:
        write_class_scores(csv, reports)
    if plot:
        draw_confusion(plot, reports)
    drawn = mistakes if mistakes and save_mistakes(reports[0], mistakes) else None
    comparison = compare(*reports) if compared else None
    if as_json:
        rows = [report.as_dict() for report in reports]
        value: Json = (
            {"models": rows, "comparison": comparison.as_dict()} if comparison else rows if len(rows) > 1 else rows[0]
        )
        typer.echo(to_json(value, indent=2))
        return
    if comparison:
        _show_comparison(comparison)
    for path in filter(None, (results_file, csv, plot, drawn)):
        typer.echo(f"saved {path}")


def _show(report: EvaluationReport) -> None:
    result = report.evaluation
    of_all = f" of {result.images + report.bad_images}" if report.bad_images else ""
    flipped = ", each with its mirror image" if report.tta else ""
    typer.echo(f"{report.model} on {report.dataset}: {result.images}{of_all} images{flipped}")
    typer.echo(f"  top-1  {result.top1:.2f} %")
    if len(report.class_names) > 5:  # else all are among the first five
        typer.echo(f"  top-5  {result.top5:.2f} %")
    typer.echo(f"  loss   {result.loss:.4f}")
    typer.echo(f"  ECE    {report.calibration_error:.2f} %")
    typer.echo(f"  memory {report.peak_memory / 2**20:.1f} MiB with a batch size of {report.batch_size}")
    if report.bad_images:
        typer.echo(f"  {counted(report.bad_images, 'unreadable image')} left out")
    for row in result.worst_classes(report.class_names):
        times = "once" if row["times"] == 1 else f"{row['times']} times"
        taken = f", {times} taken for {row['taken_for']}"  # the number first: a class may be called 4
        typer.echo(f"  worst  {row['class']}: {row['accuracy']:.1f} % of {row['images']}{taken}")


def _show_comparison(found: Comparison) -> None:
    typer.echo(f"{found.first} and {found.second} agree on {found.agreement:.2f} % of {found.images} images")
    typer.echo(f"  right alone  {found.only_first_right} and {found.only_second_right}")
    typer.echo(f"  McNemar      p = {found.p_value:.3g}, were both equally good")
