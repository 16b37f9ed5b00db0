"""Signs of life: what a rank says while it waits for data, so that those who wait for it do not take it for dead.

They travel up the pipeline in the place of the message that is missing, and so reach ranks that wait for one. A rank
that has all messages of an epoch waits for something else, and does not hear of data that is missing at the very end.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator

from petra_zoo.petra.links import Item, LinkError


def awaited(items: Iterable[Item], say: Callable[[], None], every: float) -> Iterator[Item]:
    """The items; while the next one is waited for, `say` is called every so many seconds, by a thread of its own."""
    stopped, waiting = threading.Event(), threading.Lock()  # held while nobody waits
    waiting.acquire()

    def speak() -> None:
        while not stopped.wait(every):
            if waiting.acquire(blocking=False):
                try:
                    say()
                except LinkError:
                    return  # whoever needs the other rank next will find out
                finally:
                    waiting.release()

    speaker = threading.Thread(target=speak, name="signs of life", daemon=True)
    speaker.start()
    iterator = iter(items)
    try:
        while True:
            waiting.release()
            try:
                item = next(iterator)
            except StopIteration:
                return
            finally:
                waiting.acquire()
            yield item
    finally:
        stopped.set()
