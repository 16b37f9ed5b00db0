"""In which order links post and wait: a tick takes no longer than the plan says."""

import random

import pytest

from petra_zoo.planning.durations import tick_seconds
from tests.petra.virtual_time import long_run, run_ticks

FORWARD, BACKWARD, UP, DOWN = 1.0, 3.0, 0.3, 0.6


def alike(ranks: int, one_queue: bool = False) -> float:
    links = ranks - 1
    ends = run_ticks([FORWARD] * ranks, [BACKWARD] * ranks, [UP] * links, [DOWN] * links, 6 * ranks + 12, one_queue)
    return long_run(ends, 2 * ranks)


@pytest.mark.parametrize("ranks", [2, 3, 8, 16])
def test_a_tick_does_not_grow_with_the_number_of_ranks(ranks: int) -> None:
    assert alike(ranks) == pytest.approx(FORWARD + BACKWARD)


def test_one_group_for_all_messages_of_a_direction_is_a_chain_across_the_ranks() -> None:
    assert alike(8, one_queue=True) > 1.15 * (FORWARD + BACKWARD)


@pytest.mark.parametrize("seed", range(6))
def test_a_tick_takes_no_longer_than_the_plan_says(seed: int) -> None:
    draw, ranks = random.Random(seed), 2 + seed % 4
    forward, backward = ([draw.uniform(0.2, 2.0) for _ in range(ranks)] for _ in range(2))
    up, down = ([draw.choice([0.1, 1.0, 6.0]) for _ in range(ranks - 1)] for _ in range(2))
    planned = tick_seconds([f + b for f, b in zip(forward, backward, strict=True)], up, down)
    over = 60
    assert long_run(run_ticks(forward, backward, up, down, 200), over) <= planned * (1 + 1e-9)
