"""`petra-zoo train`: train by a recipe."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from petra_zoo.training.recipe import load_recipe
from petra_zoo.training.train import train as run_training


def train(
    recipe: Annotated[str, typer.Argument(help="A recipe's name (petra-zoo recipes ls), or a .yaml file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings that replace the recipe's.")
    ] = None,
    on_bad_image: Annotated[
        Literal["fail", "skip"] | None,
        typer.Option(help="Stop at an unreadable image, or put the next one in its place."),
    ] = None,
) -> None:
    """Train a network by a recipe: petra-zoo train digits/petra_revnet_tiny epochs=5 method=dsp."""
    settings = [*(overrides or []), *([f"on_bad_image={on_bad_image}"] if on_bad_image else [])]
    result = run_training(load_recipe(recipe, settings), name=recipe)
    typer.echo(f"saved {result.path}: top-1 {result.evaluation.top1:.2f} % on {result.evaluation.images} images")
    if result.bad_images:
        typer.echo(f"{result.bad_images} unreadable training images skipped")
    if result.interrupted:
        raise typer.Exit(1)
    typer.echo(f"next: petra-zoo evaluate {result.path}")
