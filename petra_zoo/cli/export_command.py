"""`petra-zoo export`: a trained model as ONNX or torch.export."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from petra_zoo.cli.completion import complete_model
from petra_zoo.cli.sizes import image_size
from petra_zoo.strict_json import to_json

if TYPE_CHECKING:
    from petra_zoo.evaluation.export import Dynamic


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
    dynamic_size: Annotated[bool, typer.Option("--dynamic-size", help="Images of any height and width.")] = False,
    opset: Annotated[int | None, typer.Option(help="Version of ONNX's operators; default: torch's choice.")] = None,
    int8: Annotated[bool, typer.Option("--int8", help="Quantise ONNX to 8 bits; sums stay float32.")] = False,
    calibrate: Annotated[
        str | None, typer.Option(metavar="DATASET", help="Of --int8: measure ranges on it; default: the run's.")
    ] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Where the data set's files are.")] = None,
    calibration_images: Annotated[int, typer.Option(min=1, help="How many images of it at most.")] = 512,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Write a trained network for inference, checked against the model: images in, logits out.

    The file says, as its metadata, the mean and std that images are normalised by,
    their size, and the names of the classes. With --int8, the accuracy of the
    8-bit file stands beside that of the float32 one.
    """
    if (calibrate or data_dir) and not int8:
        raise typer.BadParameter("--calibrate and --data-dir are of --int8: add it")
    from petra_zoo.evaluation.export import export_model
    from petra_zoo.evaluation.quantization import Int8Images

    dynamic: list[Dynamic] = []
    if dynamic_batch:
        dynamic.append("batch")
    if dynamic_size:
        dynamic.append("size")
    done = export_model(
        source,
        output,
        format=format,
        image_size=None if input_size is None else image_size(input_size),
        dynamic=dynamic,
        opset=opset,
        int8=Int8Images(calibrate, data_dir, calibration_images) if int8 else None,
        force=force,
    )
    if as_json:
        typer.echo(to_json(done.as_dict(), indent=1))
        return
    typer.echo(f"saved {done.path}: images {done.shape} -> logits")
    typer.echo(f"  largest difference from the model {done.error:.1e} of its largest logit")
    if found := done.int8:
        typer.echo(
            f"  8 bits, by {found.calibration_images} images: top-1 {found.int8_top1:.2f} %, before {found.top1:.2f} % "
            f"of {found.images}; agreement {found.agreement:.2f} %; "
            f"{found.int8_bytes / 2**20:.2f} MiB, before {found.bytes / 2**20:.2f}"
        )
