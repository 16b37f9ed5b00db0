"""`petra-zoo report`: tables and plots of what studies have found."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from petra_zoo.cli.output import print_lines


def report(
    files: Annotated[
        list[Path], typer.Argument(metavar="RESULTS.json...", help="Of petra-zoo bench; or pages, see below.")
    ],
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write Markdown and plots there, instead of printing tables.")
    ] = None,
    update: Annotated[
        bool, typer.Option("--update", help="The files are Markdown pages: bring their tables and plots up to date.")
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help="The files are Markdown pages: tell what is not; exit code 1 if anything.")
    ] = False,
) -> None:
    """Write Markdown tables and plots of results, and keep those of Markdown pages up to date.

    A page marks a table by <!-- table: RESULTS.json NAME --> and <!-- /table -->, and a plot by
    <!-- plot: RESULTS.json NAME --> in the line above its picture.
    """
    from petra_zoo.bench import report as reports
    from petra_zoo.errors import UserError

    if sum([update, check, output is not None]) > 1:
        raise UserError("--output, --update and --check are three things: give one of them")
    if not (update or check) and (pages := [path for path in files if path.suffix == ".md"]):
        raise UserError(f"{pages[0]} is a page, not results: --check tells what in it is stale, --update mends it")
    if update:
        before = reports.standing(files)
        print_lines([*reports.update(files), *before])
    elif check:
        found = reports.differences(files)
        print_lines([*found, *reports.standing(files)])
        if found:
            raise typer.Exit(1)
    elif output is not None:
        for path in files:
            for line in reports.report_into(path, output):
                typer.echo(line)
    else:
        typer.echo("\n".join(reports.markdown_report(path) for path in files), nl=False)
