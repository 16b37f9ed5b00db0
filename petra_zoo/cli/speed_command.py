"""`petra-zoo speed`: latency and throughput of inference."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from petra_zoo.cli.completion import complete_model
from petra_zoo.cli.output import print_table
from petra_zoo.cli.sizes import image_size
from petra_zoo.strict_json import to_json
from petra_zoo.wording import counted

if TYPE_CHECKING:
    from petra_zoo.evaluation.speed import InferenceWay


def time_model(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN_OR_MODEL...",
            help="Run directories, hf-hub:ORG/NAME, or models' names.",
            autocompletion=complete_model,
        ),
    ],
    ways: Annotated[
        list[str] | None,
        typer.Option("--way", metavar="eager|compiled|onnx", help="How the network runs; repeatable; default: eager."),
    ] = None,
    batch_sizes: Annotated[
        list[int] | None, typer.Option("--batch-size", min=1, help="Repeatable; default: 1 and 32.")
    ] = None,
    input_size: Annotated[
        str | None, typer.Option(metavar="SIZE|HxW", help="Pixels, such as 224 or 192x256; default: the model's.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: the GPU where there is one.")] = None,
    amp: Annotated[bool, typer.Option("--amp", help="bfloat16 autocast.")] = False,
    repeats: Annotated[int, typer.Option(min=1, help="Timed batches of each kind.")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure how fast a network answers: milliseconds of a batch, and images per second.

    Of inference alone, with images at hand: no reading, no preprocessing. Compiling
    and writing an ONNX file come before the clock starts.
    """
    from petra_zoo.checkpoints.load import check_named
    from petra_zoo.evaluation.speed import INFERENCE_WAYS, TimingOptions, time_inference
    from petra_zoo.machine import describe_machine, describe_versions

    chosen: list[InferenceWay] = [way for way in INFERENCE_WAYS if way in (ways or ["eager"])]
    if unknown := set(ways or ()) - set(INFERENCE_WAYS):
        raise typer.BadParameter(f"--way {sorted(unknown)[0]}: expected {', '.join(INFERENCE_WAYS)}")
    options = TimingOptions(
        ways=chosen,
        batch_sizes=batch_sizes or (1, 32),
        image_size=None if input_size is None else image_size(input_size),
        device=device,
        amp=amp,
        repeats=repeats,
    )
    for source in sources:  # all of them, before minutes are spent on the first
        check_named(source)
    found = [row for source in sources for row in time_inference(source, options)]
    machine = describe_machine()
    if as_json:
        rows = [row.as_dict() for row in found]
        typer.echo(to_json({"speeds": rows, "machine": machine, "versions": describe_versions()}, indent=1))
        return
    print_table(
        ("model", "way", "batch", "ms", "fastest to slowest", "images/s"),
        [
            [
                row.model,
                row.way,
                str(row.batch_size),
                f"{row.milliseconds:.2f}",
                f"{row.fastest:.2f} to {row.slowest:.2f}",
                f"{row.images_per_second:.0f}",
            ]
            for row in found
        ],
    )
    threads = machine["threads"]
    assert isinstance(threads, int)
    typer.echo(f"{machine['processor']}, {counted(threads, 'thread')}")
