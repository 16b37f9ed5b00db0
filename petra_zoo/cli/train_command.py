"""`petra-zoo train`: train by a recipe."""

from __future__ import annotations

import shlex
from typing import Annotated, Literal

import typer

from petra_zoo.cli.completion import complete_recipe, complete_setting
from petra_zoo.extensions import import_options
from petra_zoo.wording import counted


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
    max_restarts: Annotated[
        int, typer.Option(min=0, help="With --nproc: start again after a failure, from the last checkpoint.")
    ] = 0,
    resume: Annotated[
        str,
        typer.Option(metavar="auto|PATH|never", help="Go on with the run in output=DIR, or from a checkpoint's path."),
    ] = "auto",
    allow_change: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY", help="A setting in which a run that goes on may differ; repeatable."),
    ] = None,
    max_time: Annotated[
        str | None, typer.Option(metavar="1h30m", help="Save and stop after this time; exit code 75.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print all settings, and what would be trained; start nothing.")
    ] = False,
    on_bad_image: Annotated[
        Literal["fail", "skip"] | None,
        typer.Option(help="Stop at an unreadable image, or put the next one in its place."),
    ] = None,
) -> None:
    """Train a network by a recipe: petra-zoo train digits/petra_revnet_tiny epochs=5 method=dsp.

    Gradients of the first stage are 2 (stages - 1) / accumulation_steps updates
    old. The first lines say it, and warn where it is expected to cost accuracy;
    update_size=64 max_delay=3 choose accumulation_steps and batch_size by it.

    A run whose output=DIR is there goes on where it was saved last. SIGTERM,
    SIGUSR1 or Ctrl-C ends it behind a tick, saved: exit code 75, the same command
    goes on; a second signal ends it at once.

    With --nproc 4 the stages run in four processes. On several machines, on each:
    torchrun --nnodes 2 --nproc-per-node 4 --rdzv-backend c10d --rdzv-endpoint HOST:29500 -m petra_zoo train RECIPE
    """
    from petra_zoo.petra import global_rank
    from petra_zoo.petra.layout import check_ranks
    from petra_zoo.settings.recipe_files import load_recipe
    from petra_zoo.training.launch import as_worker, launch
    from petra_zoo.training.run import train as run_training
    from petra_zoo.training.stopping import parse_duration

    settings = [*(overrides or []), *([f"on_bad_image={on_bad_image}"] if on_bad_image else [])]
    resolved, seconds = load_recipe(recipe, settings), parse_duration(max_time) if max_time else None
    if dry_run:
        from petra_zoo.settings.recipe_files import recipe_yaml
        from petra_zoo.training.dry_run import outlook

        lines = outlook(resolved, recipe).lines()
        typer.echo("\n".join([recipe_yaml(resolved), *lines]))  # what is looked for is where the eye is: at the end
        return
    if nproc and nproc > 1:
        check_ranks(nproc // resolved.data_parallel, resolved.stages)  # the processes would find it out in 20 seconds
        options = ["--resume", resume, *(["--max-time", max_time] if max_time else [])]
        options += [word for key in allow_change or [] for word in ("--allow-change", key)]
        raise typer.Exit(launch(nproc, [*import_options(), "train", recipe, *settings, *options], max_restarts))
    result = as_worker(
        lambda: run_training(resolved, name=recipe, resume=resume, allow_change=allow_change or (), max_seconds=seconds)
    )
    if global_rank() > 0:
        return
    scores = result.evaluation
    if result.finished_before:
        typer.echo(f"{result.path} is finished: top-1 {scores.top1:.2f} % on {counted(scores.images, 'image')}")
        return
    typer.echo(f"saved {result.path}: top-1 {scores.top1:.2f} % on {counted(scores.images, 'image')}")
    if result.bad_images:
        typer.echo(f"{counted(result.bad_images, 'unreadable training image')} skipped")
    if result.skipped:
        typer.echo(f"{counted(result.skipped, 'micro-batch')} left out, for they were not finite")
    typer.echo(f"next: petra-zoo evaluate {shlex.quote(str(result.path))}")
