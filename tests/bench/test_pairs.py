"""Paired differences: known values of Student's t, verdicts, how many seeds are enough."""

import math

import pytest

from petra_zoo.bench.pairs import Interval, quantile, seeds_needed, verdict


@pytest.mark.parametrize(
    ("freedom", "value"), [(1, 12.706), (2, 4.303), (4, 2.776), (9, 2.262), (10, 2.228), (19, 2.093), (100, 1.984)]
)
def test_students_t_is_that_of_the_tables(freedom: int, value: float) -> None:
    assert round(quantile(freedom), 3) == value


def test_an_interval_is_that_of_the_textbook() -> None:
    interval = Interval.of([-1.0, 0.0, 1.0, 2.0, 3.0])
    assert (interval.count, interval.mean) == (5, 1.0)
    assert interval.spread == pytest.approx(math.sqrt(2.5))
    assert interval.half_width == pytest.approx(2.7764 * math.sqrt(2.5 / 5))
    assert (interval.low, interval.high) == pytest.approx((-0.9632, 2.9632), abs=1e-4)


def test_one_pair_decides_nothing() -> None:
    assert verdict(Interval.of([-3.0])) == "not decided"


@pytest.mark.parametrize(
    ("mean", "half_width", "words"),
    [
        (0.1, 0.3, "no loss"),
        (-0.1, 0.3, "no loss"),
        (2.0, 0.5, "no loss"),
        (-0.3, 0.1, "loss below 0.5"),
        (-1.0, 0.3, "loss"),
        (-1.0, 0.99, "loss"),
        (-0.3, 0.4, "not decided"),
        (0.3, 0.9, "not decided"),
    ],
)
def test_a_verdict_says_which_question_is_closed(mean: float, half_width: float, words: str) -> None:
    assert verdict(Interval(5, mean, 1.0, half_width)) == words


@pytest.mark.parametrize(("spread", "seeds"), [(0.01, 2), (0.3, 4), (0.4, 5), (0.5, 7), (1.06, 20), (1.08, None)])
def test_a_pilots_spread_tells_how_many_pairs_are_enough(spread: float, seeds: int | None) -> None:
    assert seeds_needed(spread) == seeds
    if seeds is not None:
        assert quantile(seeds - 1) * spread / math.sqrt(seeds) <= 0.5
