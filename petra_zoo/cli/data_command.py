"""`petra-zoo data`: look at a data set before anything is trained on it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from petra_zoo.cli.completion import complete_recipe, complete_setting
from petra_zoo.cli.output import print_table
from petra_zoo.strict_json import to_json
from petra_zoo.wording import counted

if TYPE_CHECKING:
    from petra_zoo.data.survey import Copy, SplitSurvey, Survey

_SHOWN = 10  # of files, of groups of files, and of classes at either end


def data(
    dataset: Annotated[str, typer.Argument(help="digits, shapes, cifar10, folder, hfds/USER/NAME, ...")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Settings of a recipe.", autocompletion=complete_setting),
    ] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Where the data set's files are.")] = None,
    recipe: Annotated[
        str | None,
        typer.Option(help="What the sheet shows images through: size, augmentation.", autocompletion=complete_recipe),
    ] = None,
    sheet: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw training images as the network sees them.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="How many images the sheet has.")] = 32,
    limit: Annotated[int | None, typer.Option(min=1, help="Read no more of a split than so many images.")] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read images.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Look at a data set: images per class, sizes, formats, what is unreadable or there twice.

    All images are read. The exit code is 1 where one cannot be. A folder of classes
    without splits is split as training would split it: val_fraction=0.1.
    """
    from petra_zoo.data.contact_sheet import check_picture, save_picture
    from petra_zoo.data.survey import survey
    from petra_zoo.training.samples import open_for_a_look, recipe_sheet

    if sheet is not None:
        check_picture(sheet)
    settings, train, val = open_for_a_look(dataset, data_dir, recipe, overrides or [])
    if sheet is not None:
        save_picture(recipe_sheet(settings, train, count), sheet)
    found = survey(dataset, [("train", train), ("val", val)], most=limit, workers=workers)
    if as_json:
        typer.echo(to_json(found.as_dict(), indent=1))
    else:
        _show(found)
        if sheet is not None:
            typer.echo(f"saved {sheet}")
    if found.unreadable:
        raise typer.Exit(1)


def _show(found: Survey) -> None:
    for split in found.splits:
        _show_split(split)
    columns = [split.per_class for split in found.splits]
    names = sorted({name for column in columns for name in column}, key=lambda name: -columns[0].get(name, 0))
    rows = [(name, *(str(column.get(name, 0)) for column in columns)) for name in names]
    left_out = len(rows) - 2 * _SHOWN
    shown = rows if left_out <= 1 else [*rows[:_SHOWN], (f"({left_out} more)", "", ""), *rows[-_SHOWN:]]
    print_table(("class", *(split.split for split in found.splits)), shown)
    _list("the same image to train on and to validate on", map(_same, found.across))
    _list("the same image in several classes", map(_same, found.contradicting))
    _list("the same image twice in a class", map(_same, found.harmless))


def _show_split(split: SplitSurvey) -> None:
    of = f", {split.looked_at} of them read" if split.looked_at < split.images else ""
    typer.echo(f"{split.split}: {counted(split.images, 'image')} of {len(split.per_class)} classes{of}")
    if split.sizes:
        widths, heights = zip(*split.sizes, strict=True)
        if len(split.sizes) == 1:
            sizes = f"all {widths[0]}x{heights[0]}"
        else:
            median = "x".join(map(str, split.median_size()))
            sizes = f"{min(widths)}x{min(heights)} to {max(widths)}x{max(heights)}, median {median}"
        typer.echo(f"  size   {sizes}")
        mean, std = (", ".join(f"{value:.4f}" for value in values) for values in (split.mean, split.std))
        typer.echo(f"  pixels mean=[{mean}] std=[{std}]")
    if split.formats:
        typer.echo("  files  " + ", ".join(f"{number} {kind}" for kind, number in split.formats.most_common()))
    if split.split == "train" and split.imbalance >= 2:
        how = "sampler=balanced or class_weights=balanced makes up for it"
        typer.echo(f"  the largest class has {split.imbalance:.1f} times the images of the smallest: {how}")
    _list("cannot be read", (f"{bad.source}: {bad.reason}" for bad in split.unreadable))


def _list(what: str, lines: Iterable[str]) -> None:
    """A few of the lines, under how many there are."""
    found = list(lines)
    if found:
        typer.echo(f"  {len(found)} {what}:")
    for line in found[:_SHOWN]:
        typer.echo(f"    {line}")
    if len(found) > _SHOWN:
        typer.echo(f"    and {len(found) - _SHOWN} more (--json has all)")


def _same(copies: list[Copy]) -> str:
    return " = ".join(f"{copy.source} ({copy.split})" for copy in copies)
