"""`petra-zoo train`: train by a recipe."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from petra_zoo.cli.completion import complete_recipe, complete_setting
from petra_zoo.extensions import import_options


def train(
    recipe: Annotated[
        str,
        typer.Argument(help="A recipe's name (petra-zoo recipes ls), or a .yaml file.", autocompletion=complete_recipe),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Settings that replace the recipe's; petra-zoo recipes show RECIPE --resolved prints all.",
            autocompletion=complete_setting,
        ),
    ] = None,
    nproc: Annotated[
        int | None, typer.Option(min=1, help="Processes to start on this machine; each owns consecutive stages.")
    ] = None,
    on_bad_image: Annotated[
        Literal["fail", "skip"] | None,
        typer.Option(help="Stop at an unreadable image, or put the next one in its place."),
    ] = None,
) -> None:
    """Train a network by a recipe: petra-zoo train digits/petra_revnet_tiny epochs=5 method=dsp.

    Gradients of the first stage are 2 (stages - 1) / accumulation_steps updates
    old. The first lines say it, and warn where it is expected to cost accuracy;
    update_size=64 max_delay=3 choose accumulation_steps and batch_size by it.

    With --nproc 4 the stages run in four processes. On several machines, on each:
    torchrun --nnodes 2 --nproc-per-node 4 --rdzv-backend c10d --rdzv-endpoint HOST:29500 -m petra_zoo train RECIPE
    """
    from petra_zoo.petra import global_rank
    from petra_zoo.settings.recipe_files import load_recipe
    from petra_zoo.training.launch import as_worker, launch
    from petra_zoo.training.run import train as run_training

    settings = [*(overrides or []), *([f"on_bad_image={on_bad_image}"] if on_bad_image else [])]
    resolved = load_recipe(recipe, settings)
    if nproc and nproc > 1:
        raise typer.Exit(launch(nproc, [*import_options(), "train", recipe, *settings]))
    result = as_worker(lambda: run_training(resolved, name=recipe))
    if global_rank() > 0:
        return
    typer.echo(f"saved {result.path}: top-1 {result.evaluation.top1:.2f} % on {result.evaluation.images} images")
    if result.bad_images:
        typer.echo(f"{result.bad_images} unreadable training images skipped")
    if result.interrupted:
        raise typer.Exit(1)
    typer.echo(f"next: petra-zoo evaluate {result.path}")
