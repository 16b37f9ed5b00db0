"""`petra-zoo predict`: what a model sees in image files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from petra_zoo.cli.completion import complete_model
from petra_zoo.strict_json import to_json
from petra_zoo.wording import counted


def predict(
    images: Annotated[
        list[Path], typer.Argument(metavar="IMAGE...", help="Image files, folders of them, or 'wildcards/**/*.jpg'.")
    ],
    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            metavar="RUN_OR_MODEL",
            help="A run, hf-hub:ORG/NAME or a pretrained name.",
            autocompletion=complete_model,
        ),
    ] = "petra_revnet_tiny.digits",
    topk: Annotated[int, typer.Option(min=1, help="Classes per image.")] = 5,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE.csv|.jsonl", help="Write a table, instead of printing.")
    ] = None,
    features: Annotated[
        Path | None,
        typer.Option(metavar="FILE.safetensors", help="Write what the classifier reads, and the images' names."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 32,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read images.")] = 0,
    on_bad_image: Annotated[
        Literal["fail", "skip"], typer.Option(help="Stop at an unreadable image, or leave it out.")
    ] = "fail",
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: the GPU where there is one.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Classify image files with a trained model; by default the one for handwritten digits that comes along."""
    from petra_zoo.device import choose_device
    from petra_zoo.evaluation.bulk_prediction import find_image_files, write_predictions
    from petra_zoo.evaluation.prediction import PredictionOptions, look_at

    options = PredictionOptions(topk, batch_size, workers, device, on_bad_image, progress=True)
    choose_device(device)  # a mistake in it is one whatever the images are
    files = find_image_files(images)
    if output or features:
        done = write_predictions(model, files, output=output, features=features, options=options)
        left_out = f", {done.bad_images} unreadable left out" if done.bad_images else ""
        files_written = " and ".join(str(path) for path in (output, features) if path)
        typer.echo(f"saved {files_written}: {counted(done.images, 'image')}{left_out}")
        return
    predictions = [seen.prediction for seen in look_at(model, files, options)]
    if as_json:
        typer.echo(to_json([prediction.as_dict() for prediction in predictions], indent=2))
        return
    for prediction in predictions:
        typer.echo(prediction.image)
        for guess in prediction.guesses:
            typer.echo(f"  {guess.probability:7.2%}  {guess.label}")
