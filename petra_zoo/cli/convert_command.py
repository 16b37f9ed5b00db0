"""`petra-zoo convert`: a trained network becomes a reversible one."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from petra_zoo.cli.completion import complete_source
from petra_zoo.errors import UserError
from petra_zoo.strict_json import to_json

if TYPE_CHECKING:
    from petra_zoo.converters.checkpoint_conversion import Conversion
    from petra_zoo.converters.reconstruction import CoupledRun


def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A timm name, torchvision:MODEL.WEIGHT, hf-hub:ORG/NAME, a run, or weights.",
            autocompletion=complete_source,
        ),
    ],
    output: Annotated[Path, typer.Option(help="The directory to write; it must be absent or empty.")],
    arch: Annotated[str | None, typer.Option(help="The timm architecture of a file of weights.")] = None,
    coupling: Annotated[
        str, typer.Option(help="auto, one number, or one per run (a ResNet's four layers) such as 0,0.25,0.5,0.")
    ] = ("auto"),
    purpose: Annotated[
        Literal["one-device", "petra"],
        typer.Option("--for", help="auto leaves short runs irreversible on one device; PETRA wants all reversible."),
    ] = "one-device",
    tolerance: Annotated[float, typer.Option(help="Largest relative error of a reconstructed input.")] = 1e-4,
    calibrate: Annotated[
        str | None, typer.Option(metavar="DATASET", help="Estimate batch-norm statistics anew, and compare, on it.")
    ] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Where the data set's files are.")] = None,
    calibration_images: Annotated[int, typer.Option(min=2, help="How many images of it at most.")] = 1024,
    exact: Annotated[bool, typer.Option("--exact", help="Reconstruct to the bit: the same as --inverse bits.")] = False,
    inverse: Annotated[
        Literal["auto", "anchors", "bits"] | None,
        typer.Option(
            help="Keep streams every few blocks, or the bits that a block drops; auto: by memory and fidelity. "
            "Default: anchors for ResNets, auto for others."
        ),
    ] = None,
    units: Annotated[
        Literal["auto", "branch", "block"],
        typer.Option(
            help="What is reversed at once: block, also auto: whole blocks; branch: a transformer's attention and MLP "
            "in turn, which peaks lower and takes more inverses."
        ),
    ] = "auto",
    report: Annotated[
        Path | None,
        typer.Option(help="Write the comparison: a .json, .md or .png file, or a directory for all three."),
    ] = None,
    to_resnet: Annotated[
        bool,
        typer.Option(
            "--to-plain", "--to-resnet", help="The way back: a reversible network with coupling 0 as timm's plain one."
        ),
    ] = False,
    push: Annotated[
        str | None, typer.Option(metavar="ORG/NAME", help="Publish the converted network on the Hub as well.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Convert a trained network into a reversible one that predicts (almost) the same, and save it for timm."""
    from petra_zoo.converters.checkpoint_conversion import convert_back, convert_checkpoint
    from petra_zoo.data.calibration_images import CalibrationImages

    if to_resnet:
        name = convert_back(source, output)
        typer.echo(
            to_json({"source": source, "output": str(output), "architecture": name})
            if as_json
            else f"saved {output}: {name}"
        )
        return
    done = convert_checkpoint(
        source,
        output,
        architecture=arch,
        coupling="auto" if coupling == "auto" else _numbers(coupling),
        purpose=purpose,
        tolerance=tolerance,
        images=CalibrationImages(calibrate, data_dir, calibration_images) if calibrate else None,
        report=report,
        exact=_exact(exact, inverse),
        units=units,
    )
    pushed = None
    if push:
        from petra_zoo.hub import push as publish

        pushed = publish(output, push)
    if as_json:
        typer.echo(to_json({**done.as_dict(), **({"pushed": pushed.as_dict()} if pushed else {})}))
        return
    typer.echo(f"saved {done.output}: {done.architecture}")
    for run in done.runs:
        typer.echo(f"  {run.layer}  {_line(run, done)}")
    if not done.reversible_blocks:
        typer.echo(f"  nothing was made reversible: {done.why_nothing()}")
    if done.calibration_images:
        typer.echo(f"  batch-norm statistics estimated on {done.calibration_images} images")
    if done.reversible_blocks:
        typer.echo(f"  logits differ from the source's by {100 * done.drift:.1f} % of their size")
    if done.memory:
        peaks = ", ".join(f"{name} {found.peak / 2**20:.2f}" for name, found in done.memory.items())
        typer.echo(f"  activations of a training step, MiB per image at the peak: {peaks}")
    if (same := done.fidelity) is not None:
        typer.echo(f"  agreement with the source {same.agreement:.2f} % of {same.images} images, KL {same.kl:.4f}")
        if same.source_top1 is not None:
            typer.echo(f"  top-1  source {same.source_top1:.2f} %, converted {same.converted_top1:.2f} %")
    for file in done.report_files:
        typer.echo(f"  report {file}")
    if pushed:
        typer.echo(f"pushed {pushed.url}" if pushed.changed else f"nothing has changed since {pushed.url}: no commit")
    name = to_json(f"local-dir:{done.output}")  # a Python literal in quotes that shells leave
    code = f"import petra_zoo, timm; model = timm.create_model({name}, pretrained=True)"
    typer.echo(f"next: python -i -c {shlex.quote(code)}")


def _line(run: CoupledRun, done: Conversion) -> str:
    if not run.g:
        return f"not reversible (coupling 0): {done.why_not(run)}"
    from petra_zoo.converters.checkpoint_conversion import count_blocks

    kept = f", kept every {run.anchor_every} blocks" if run.anchor_every else ""
    kept += f", {run.bits} bit{'s' if run.bits > 1 else ''} per element kept" if run.bits else ""
    steps = f", blocks add up to {max(steps):.2g} of their input" if (steps := done.steps.get(run.layer)) else ""
    return (
        f"{count_blocks(run.blocks)} reversible, coupling {run.g:g}{kept}, reconstruction error {run.error:.1e}{steps}"
    )


def _exact(exact: bool, inverse: Literal["auto", "anchors", "bits"] | None) -> bool | Literal["auto"] | None:
    if exact and inverse not in (None, "bits"):
        raise UserError(f"--exact is --inverse bits, and goes with no --inverse {inverse}: leave one of them out")
    if inverse is None:
        return True if exact else None
    return "auto" if inverse == "auto" else inverse == "bits"


def _numbers(text: str) -> float | list[float]:
    try:
        numbers = [float(word) for word in text.split(",")]
    except ValueError:
        raise UserError(
            f"--coupling {text}: expected auto, one number, or four (one per layer; other networks: one per run)"
        ) from None
    return numbers if len(numbers) > 1 else numbers[0]
