"""`petra-zoo export`: a trained model as ONNX or torch.export."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

import typer

from petra_zoo.cli.completion import complete_model
from petra_zoo.errors import UserError


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
) -> None:
    """Write a trained network for inference, checked against the model: images in, logits out."""
    from petra_zoo.evaluation.export import export_model

    size = None if input_size is None else _size(input_size)
    done = export_model(source, output, format=format, image_size=size, dynamic_batch=dynamic_batch)
    batch = "N" if done.dynamic_batch else "1"
    typer.echo(f"saved {done.path}: images {batch}x{'x'.join(map(str, done.input_size))} -> logits")
    typer.echo(f"  largest difference from the model {done.error:.1e} of its largest logit")


def _size(text: str) -> tuple[int, int]:
    if not (match := re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", text)):
        raise UserError(f"--input-size {text}: expected pixels, such as 224 or 192x256 (height x width)")
    return int(match[1]), int(match[2] or match[1])
