"""`petra-zoo predict`: what a model sees in image files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from petra_zoo.cli.completion import complete_model
from petra_zoo.strict_json import to_json


def predict(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Image files.")],
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
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: the GPU where there is one.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Classify image files with a trained model; by default the one for handwritten digits that comes along."""
    from petra_zoo.evaluation.prediction import predict_images

    predictions = predict_images(model, images, topk=topk, device=device)
    if as_json:
        typer.echo(to_json([prediction.as_dict() for prediction in predictions], indent=2))
        return
    for prediction in predictions:
        typer.echo(prediction.image)
        for guess in prediction.guesses:
            typer.echo(f"  {guess.probability:7.2%}  {guess.label}")
