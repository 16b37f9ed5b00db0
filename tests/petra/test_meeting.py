"""Processes that meet in a store which those before them have left behind."""

import threading
import time
from contextlib import suppress
from datetime import timedelta

import pytest
import torch.distributed as dist

from petra_zoo.petra.meeting import fresh_store

pytestmark = pytest.mark.timeout(60)
LIMIT = timedelta(seconds=20)


@pytest.fixture
def launchers_store() -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def own_client(store: dist.TCPStore) -> dist.Store:
    return dist.TCPStore("127.0.0.1", store.port, is_master=False)


def meet(store: dist.TCPStore, order: list[int], size: int = 3) -> list[int]:
    """How many have come to where each process is, once all that were started with it have; they come in turn."""
    found: list[int] = []

    def come(rank: int) -> None:
        own = fresh_store(own_client(store), rank, size, LIMIT)
        own.add("come", 1)
        own.set(f"place {rank}", "there")
        own.wait([f"place {other}" for other in range(size)], LIMIT)
        found.append(own.add("come", 0))

    threads = [threading.Thread(target=come, args=(rank,), daemon=True) for rank in order]
    for thread in threads:
        thread.start()
        time.sleep(0.2)
    for thread in threads:
        thread.join(30)
    return found


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0]])
def test_those_that_are_started_again_meet_apart_from_those_before(
    launchers_store: dist.TCPStore, order: list[int]
) -> None:
    for again in (order, order[::-1], order):
        assert meet(launchers_store, again) == [3, 3, 3]


def test_one_that_was_started_twice_before_the_others_came_meets_them(launchers_store: dist.TCPStore) -> None:
    with suppress(TimeoutError):
        fresh_store(own_client(launchers_store), 1, 3, timedelta(seconds=0.2))
    assert meet(launchers_store, [0, 2, 1]) == [3, 3, 3]


def test_one_that_waits_in_vain_says_so(launchers_store: dist.TCPStore) -> None:
    with pytest.raises(TimeoutError, match="not all of 2 processes have come"):
        fresh_store(own_client(launchers_store), 0, 2, timedelta(seconds=0.2))
