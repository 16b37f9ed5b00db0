"""A bar for whatever takes more than a moment, where a person watches: on a terminal, beside what is printed."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

SHOWN_AFTER = 2.0  # seconds: what is over sooner needs no bar

T = TypeVar("T")


def tracked(items: Iterable[T], what: str, total: int, console: Console | None = None) -> Iterator[T]:
    """The items as they come, and a bar that disappears at the end.

    Args:
        items: of which each takes about as long.
        what: is being done, in a word or two.
        total: how many there are.
        console: rich's; default: stderr. Nothing is shown where it is no terminal.
    """
    console = console or Console(stderr=True)
    if not console.is_terminal:
        yield from items
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    bar, started = Progress(*columns, console=console, transient=True), time.monotonic()
    task = bar.add_task(what, total=total)
    try:
        for item in items:
            yield item
            bar.advance(task)
            if time.monotonic() - started > SHOWN_AFTER:
                bar.start()  # which does nothing where it has been
    finally:
        bar.stop()
