"""Finding each other again: processes that a launcher has started anew meet in a store that others have used.

A launcher keeps its store from one start of its processes to the next, and in it what they had written. How often it
has started them does not tell one start from another: each machine's launcher counts its own failures. So every process
writes down a mark of its own, and the first one asks all of them whether they have seen each other's.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import Store

_EVERY = 0.05  # seconds between two looks


def fresh_store(store: Store, rank: int, size: int, timeout: timedelta) -> Store:
    """A part of a store that nobody but the processes of this start uses, the same for all of them.

    Args:
        store: which may hold what earlier starts have written.
        rank, size: this process among those that were started with it.
        timeout: until all of them have come.

    Raises:
        TimeoutError: not all have.
    """
    own, end = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    store.set(f"mark {rank}", own)
    look = _leader(store, size) if rank == 0 else _follower(store, rank, own)
    while (session := look()) is None:
        if time.monotonic() > end:
            raise TimeoutError(f"not all of {size} processes have come")
        time.sleep(_EVERY)
    return dist.PrefixStore(f"session {session}", store)


def _leader(store: Store, size: int) -> Callable[[], str | None]:
    """Proposes a session to those whose marks there are, anew when a mark changes; begins it when all have agreed."""
    marks = [f"mark {rank}" for rank in range(size)]
    agreed = [f"agreed {rank}" for rank in range(1, size)]
    session, of = "", list[str]()

    def look() -> str | None:
        nonlocal session, of
        if not store.check(marks):
            return None
        now = [store.get(key).decode() for key in marks]
        if now != of:
            session, of = uuid.uuid4().hex, now
            store.set("proposed", json.dumps([session, now]))
        if agreed and not (store.check(agreed) and all(store.get(key).decode() == session for key in agreed)):
            return None
        store.set("begun", session)
        return session

    return look


def _follower(store: Store, rank: int, own: str) -> Callable[[], str | None]:
    """Agrees to a session that knows this process's mark, and waits until that very one begins."""
    session = ""

    def look() -> str | None:
        nonlocal session
        if store.check(["proposed"]):
            proposed, marks = json.loads(store.get("proposed"))
            if len(marks) > rank and marks[rank] == own and proposed != session:
                session = proposed
                store.set(f"agreed {rank}", session)
        begun = store.check(["begun"]) and store.get("begun").decode()
        return session if session and begun == session else None

    return look
