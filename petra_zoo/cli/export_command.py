"""`petra-zoo export`: a trained model as ONNX or torch.export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from petra_zoo.cli.completion import complete_model
from petra_zoo.cli.sizes import image_size


def export(
    source: Annotated[
        str,
        typer.Argument(
            metavar="RUN_OR_MODEL",
            help="A run directory, hf-hub:ORG/NAME, or a pretrained model.",
            autocompletion=complete_model,
        ),
    ],
    output: Annotated[Path, typer.Option(help="The file to write, such as model.onnx or model.pt2.")],
    format: Annotated[Literal["onnx", "torch-export"], typer.Option(help="Onnx needs the extra 'export'.")] = "onnx",
    input_size: Annotated[
        str | None, typer.Option(metavar="SIZE|HxW", help="Pixels, such as 224 or 192x256; default: the model's.")
    ] = None,
    dynamic_batch: Annotated[bool, typer.Option("--dynamic-batch", help="Any number of images at a time.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
) -> None:
    """Write a trained network for inference, checked against the model: images in, logits out.

    The file says, as its metadata, the mean and std that images are normalised by,
    their size, and the names of the classes.
    """
    from petra_zoo.evaluation.export import export_model

    size = None if input_size is None else image_size(input_size)
    done = export_model(source, output, format=format, image_size=size, dynamic_batch=dynamic_batch, force=force)
    batch = "N" if done.dynamic_batch else "1"
    typer.echo(f"saved {done.path}: images {batch}x{'x'.join(map(str, done.input_size))} -> logits")
    typer.echo(f"  largest difference from the model {done.error:.1e} of its largest logit")
