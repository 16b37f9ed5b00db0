"""Seconds of schedules, against closed forms and against a simulation of the ticks."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from petra_zoo.planning.durations import gpipe, one_forward_one_backward, tick_seconds, update_seconds

SECONDS = st.integers(1, 40).map(float)


@given(p=st.integers(1, 8), m=st.integers(1, 16), f=SECONDS, b=SECONDS)
def test_equal_stages_take_m_plus_p_minus_1_slots(p: int, m: int, f: float, b: float) -> None:
    free = [0.0] * (p - 1)
    for make in (gpipe, one_forward_one_backward):
        assert update_seconds(make(p, m), [f] * p, [b] * p, free, free) == (m + p - 1) * (f + b)


@given(data=st.data(), p=st.integers(2, 5), m=st.integers(1, 9))
def test_a_schedule_is_never_faster_than_its_slowest_stage_and_every_micro_batchs_way(
    data: st.DataObject, p: int, m: int
) -> None:
    forward, backward = (data.draw(st.lists(SECONDS, min_size=p, max_size=p)) for _ in range(2))
    up, down = (data.draw(st.lists(SECONDS, min_size=p - 1, max_size=p - 1)) for _ in range(2))
    way = sum(forward) + sum(backward) + sum(up) + sum(down)
    slowest = max(f + b for f, b in zip(forward, backward, strict=True))
    for make in (gpipe, one_forward_one_backward):
        seconds = update_seconds(make(p, m), forward, backward, up, down)
        assert seconds >= max(way, m * slowest)
        assert seconds <= m * way


def test_1f1b_keeps_p_minus_r_micro_batches_in_stage_r_and_gpipe_all() -> None:
    for make, expected in ((one_forward_one_backward, [4, 3, 2, 1]), (gpipe, [6] * 4)):
        kept = []
        for order in make(4, 6):
            alive = most = 0
            for kind, _ in order:
                alive += 1 if kind == "forward" else -1
                most = max(most, alive)
            kept.append(most)
        assert kept == expected


def test_orders_that_never_end_are_refused() -> None:
    with pytest.raises(ValueError, match="wait for each other"):
        update_seconds([[("backward", 0), ("forward", 0)], [("forward", 0), ("backward", 0)]], [1, 1], [1, 1], [0], [0])


def simulated_tick(forward: list[float], backward: list[float], up: list[float], down: list[float]) -> float:
    """Every stage runs forward then backward in every tick, on what was sent in the tick before."""
    p, ticks, warm = len(forward), 400, 200
    clock = [0.0] * p
    sent_up, sent_down = [0.0] * p, [0.0] * p  # when the message for stage j arrives
    marks = []
    for _ in range(ticks):
        next_up, next_down = [0.0] * p, [0.0] * p
        for j in range(p):
            clock[j] = max(clock[j], sent_up[j]) + forward[j]
            if j + 1 < p:
                next_up[j + 1] = clock[j] + up[j]
            elif j > 0:
                next_down[j - 1] = clock[j] + backward[j] + down[j - 1]
            clock[j] = max(clock[j], sent_down[j]) + backward[j]
            if 0 < j < p - 1:
                next_down[j - 1] = clock[j] + down[j - 1]
        sent_up, sent_down = next_up, next_down
        marks.append(max(clock))
    return (marks[-1] - marks[warm - 1]) / (ticks - warm)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), p=st.integers(2, 5))
def test_the_tick_is_what_a_simulation_of_the_pipeline_takes(data: st.DataObject, p: int) -> None:
    forward, backward = (data.draw(st.lists(SECONDS, min_size=p, max_size=p)) for _ in range(2))
    up, down = (data.draw(st.lists(st.integers(0, 30).map(float), min_size=p - 1, max_size=p - 1)) for _ in range(2))
    stages = [f + b for f, b in zip(forward, backward, strict=True)]
    found = tick_seconds(stages, up, down)
    busy_links = max(*stages, *up, *down) == found and found > max(stages)  # the simulation's links are never busy
    if not busy_links:
        assert simulated_tick(forward, backward, up, down) == pytest.approx(found, rel=0.02)


@given(p=st.integers(2, 6), seconds=SECONDS, share=st.floats(0, 0.5))
def test_links_hide_while_a_message_up_and_one_down_take_less_than_a_tick(p: int, seconds: float, share: float) -> None:
    links = [share * seconds] * (p - 1)
    assert tick_seconds([seconds] * p, links, links) == pytest.approx(seconds)
