"""`petra-zoo plan`: what each method would do on the devices one has."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from petra_zoo.cli.completion import complete_model
from petra_zoo.cli.output import print_table
from petra_zoo.cli.sizes import input_size
from petra_zoo.strict_json import to_json


def plan(
    model: Annotated[str, typer.Argument(help="A model's name (petra-zoo list).", autocompletion=complete_model)],
    devices: Annotated[int, typer.Option(min=1, help="How many devices there are.")] = 8,
    bandwidth: Annotated[str, typer.Option(help="Of a link, each way: 10GB/s, 100Gbit/s.")] = "10GB/s",
    latency: Annotated[str, typer.Option(help="Of a message: 10us.")] = "10us",
    memory: Annotated[str | None, typer.Option(help="Of a device: 24GB. What needs more is rejected.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images per micro-batch; default 64.")] = None,
    image: Annotated[
        str | None,
        typer.Option(
            "--input-size", metavar="SIZE|HxW|CxHxW", help="Pixels, such as 224 or 192x256; default: the model's."
        ),
    ] = None,
    micro_batches: Annotated[int, typer.Option(min=1, help="Per update: m, or k of petra, dividing its delay.")] = 8,
    optimizer_states: Annotated[int, typer.Option(min=0, help="Per parameter: SGD momentum 1, AdamW 2.")] = 1,
    device: Annotated[str | None, typer.Option(help="Where to measure; default: the GPU where there is one.")] = None,
    profile: Annotated[Path | None, typer.Option(help="A saved profile, instead of measuring here.")] = None,
    save_profile: Annotated[Path | None, typer.Option(help="Write the profile as JSON.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw it, for example as plan.png.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, every link and device in it.")] = False,
) -> None:
    """Predict speed, links, memory and delay of PETRA and its peers on 1 to 64 devices.

    The delay of PETRA's first stage is 2 (stages - 1) / micro-batches updates; a
    warning says where it is expected to cost accuracy.
    """
    from petra_zoo.figures import check_figure
    from petra_zoo.planning.cluster import Cluster
    from petra_zoo.planning.plan import PLAN_COLUMNS, draw, make_plan
    from petra_zoo.planning.profiles import profile_of
    from petra_zoo.planning.quantities import parse_bandwidth, parse_bytes, parse_seconds

    cluster = Cluster(
        parse_bandwidth(bandwidth, "--bandwidth"),
        parse_seconds(latency, "--latency"),
        None if memory is None else parse_bytes(memory, "--memory"),
    )
    if plot is not None:
        check_figure(plot)
    size = None if image is None else input_size(image)
    found = profile_of(model, profile, batch_size=batch_size, input_size=size, device=device)
    if save_profile is not None:
        found.save(save_profile)
    result = make_plan(found, devices, cluster, micro_batches=micro_batches, optimizer_states=optimizer_states)
    if plot is not None:
        draw(result, plot)
    if as_json:
        typer.echo(to_json(result.as_dict(), indent=1))
        return
    for note in result.notes():
        typer.echo(note)
    counts = [str(p.devices) for p in next(iter(result.curves.values()))]
    print_table(PLAN_COLUMNS, result.rows(), title=f"on {devices} devices")
    print_table(("method", *counts), result.curve_rows(), title="images/s by devices")
