"""Timing that a busy machine does not bend: contenders take turns, and are compared within a round."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Mapping, Sequence

Seconds = dict[str, list[float]]  # of each contender, one number per round


def take_turns(blocks: Mapping[str, Callable[[], float]], rounds: int, warm_up: int = 0) -> Seconds:
    """Lets every contender run once per round, in a new order in each: the same orders in every process.

    Args:
        blocks: run something and give the seconds that it took.
        rounds: how often each of them runs.
        warm_up: further rounds before, which do not count.
    """
    seconds: Seconds = {name: [] for name in blocks}
    for number in range(-warm_up, rounds):
        order = list(blocks)
        random.Random(number).shuffle(order)
        for name in order:
            took = blocks[name]()
            if number >= 0:
                seconds[name].append(took)
    return seconds


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """The median of the ratios within a round: what slows a round down slows both."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))
