"""`petra-zoo lr`: a learning rate for a recipe, by trying a range of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from petra_zoo.cli.completion import complete_recipe, complete_setting
from petra_zoo.cli.output import print_table
from petra_zoo.strict_json import to_json
from petra_zoo.wording import counted

_SHOWN = 16  # rows


def lr(
    recipe: Annotated[
        str,
        typer.Argument(help="A recipe's name (petra-zoo recipes ls), or a .yaml file.", autocompletion=complete_recipe),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE", help="Settings that replace the recipe's.", autocompletion=complete_setting
        ),
    ] = None,
    lowest: Annotated[float, typer.Option("--from", help="The smallest rate.")] = 1e-5,
    highest: Annotated[float, typer.Option("--to", help="The largest rate.")] = 10.0,
    rates: Annotated[int, typer.Option(min=5, help="How many rates, of equal ratio.")] = 36,
    updates: Annotated[
        int, typer.Option(min=1, help="At each rate; more are made where the delay of the pipeline takes them.")
    ] = 8,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw the curve.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, every rate in it.")] = False,
) -> None:
    """Find a learning rate: train at rates that grow, and see where the loss falls fastest.

    A rate is held until the gradients and losses of the whole pipeline are its own:
    2 (stages - 1) ticks or more. Nothing is saved; the last line is what to lay over
    the recipe. It is where a search begins, and no more.
    """
    from petra_zoo.errors import Failure
    from petra_zoo.figures import check_figure
    from petra_zoo.settings.delay import say_update
    from petra_zoo.settings.recipe_files import load_recipe
    from petra_zoo.training.rate_range import draw_rates, exponential, try_rates

    if plot is not None:
        check_figure(plot)
    settings, wanted = load_recipe(recipe, overrides or []), exponential(lowest, highest, rates)
    title = f"{settings.model} on {settings.dataset}, {settings.opt}: {say_update(settings)}"
    if not as_json:
        typer.echo(title)
    found = try_rates(settings, wanted, updates)
    if plot is not None:
        draw_rates(found, plot, title)
    if as_json:
        typer.echo(to_json(found.as_dict(), indent=1))
    else:
        typer.echo(f"each rate is held for {counted(found.held, 'tick')}, of which the last {found.counted} count")
        every = -(-len(found.rates) // _SHOWN)
        rows = list(zip(found.rates, found.losses, found.smoothed, strict=True))[::every]
        print_table(("rate", "loss", "smoothed"), [(f"{a:.2e}", f"{b:.4g}", f"{c:.4g}") for a, b, c in rows])
    if found.suggestion is None:
        raise Failure(f"no rate is suggested: {found.rule}")
    if not as_json:
        typer.echo(f"lowest loss at {found.lowest:.2g}; suggested: {found.rule}")
        typer.echo(f"lr={found.suggestion:g}")
