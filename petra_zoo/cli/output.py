"""What commands print: tables on a terminal, plain lines in a pipe."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Sequence

import typer

_SEPARATORS = re.compile(r"[\t\r\n]+")  # of plain tables, which a class may have in its name


def on_terminal() -> bool:
    """Whether a person reads it; rich's own judgement, which FORCE_COLOR and the like change."""
    from rich.console import Console

    return Console().is_terminal


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, title: str | None = None) -> None:
    """Prints rows under their columns' names: as a table on a terminal, else with tabs between."""
    if not on_terminal():
        for line in ([title] if title else [], columns, *rows):
            if line:
                typer.echo("\t".join(_SEPARATORS.sub(" ", cell) for cell in line))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    rows, console = list(rows), Console()
    for padding in (1, 0):  # between columns
        table = Table(*columns, title=title, box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, padding))
        for row in rows:
            table.add_row(*row)
        if console.measure(table, options=console.options.update(width=10**4)).maximum <= console.width:
            console.print(table)
            return
    # rich would cut names off, and a name that is cut off names nothing.
    for name, *values in rows:
        typer.echo(name)
        facts = [f"{column} {value}" for column, value in zip(columns[1:], values, strict=True) if value]
        typer.echo(_indented(facts, console.width))


def _indented(facts: Iterable[str], width: int) -> str:
    """In lines of that width, as far as no fact has to be torn apart."""
    text = ", ".join(fact.replace(" ", "\0") for fact in facts)
    lines = textwrap.wrap(text, width - 2, break_long_words=False, break_on_hyphens=False)
    return textwrap.indent("\n".join(lines), "  ").replace("\0", " ")


def print_lines(lines: Iterable[str]) -> None:
    """Prints nothing at all where there are no lines."""
    typer.echo("".join(f"{line}\n" for line in lines), nl=False)
