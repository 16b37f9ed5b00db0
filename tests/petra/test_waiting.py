"""Waiting where the device does, and not the host."""

import time
from datetime import timedelta

import pytest

from petra_zoo.petra import LinkError
from petra_zoo.petra.waiting import OneBehind


class Place:
    """In the queue of a device that passes it in so many seconds."""

    def __init__(self, seconds: float) -> None:
        self.passed = time.monotonic() + seconds

    def query(self) -> bool:
        return time.monotonic() >= self.passed


def test_the_host_is_one_message_ahead_of_the_device() -> None:
    places = [Place(0.1), Place(0.2), Place(60.0)]
    behind = OneBehind(iter(places).__next__)
    for number in range(len(places)):
        behind.follow(timedelta(seconds=5), f"message {number}")
        assert number == 0 or places[number - 1].query()
    assert not places[-1].query()


def test_a_message_that_a_device_never_gets_is_named() -> None:
    behind = OneBehind(iter([Place(0.0), Place(60.0), Place(0.0)]).__next__)
    behind.follow(timedelta(seconds=0.1), "tick 1 from rank 0")
    behind.follow(timedelta(seconds=0.1), "tick 2 from rank 0")
    with pytest.raises(LinkError, match=r"tick 2 from rank 0: the device has not got it within 0\.1 s"):
        behind.follow(timedelta(seconds=0.1), "tick 3 from rank 0")
