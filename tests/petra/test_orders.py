"""In which order links post and wait, and what they keep: a tick takes no longer than the plan says."""

import random
import weakref

import pytest
import torch

from petra_zoo.petra import World
from petra_zoo.petra.channels import Channels
from petra_zoo.petra.messages import Up
from petra_zoo.petra.process_links import ProcessLinks
from petra_zoo.planning.durations import tick_seconds
from tests.petra.virtual_time import Queue, Rank, VirtualChannel, Way, long_run, run_ticks

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


def test_what_was_sent_is_kept_once_until_the_next_tick() -> None:
    channels = Channels(to_above=VirtualChannel(Rank(), Way(0.0), Queue(), peer=1))
    links = ProcessLinks(World(rank=0, size=2, peers=(0, 1), channels=channels), range(1))
    x = torch.arange(6.0).view(2, 3)
    sent, gone = x.clone(), weakref.ref(x)
    links.send_up(1, Up(5, (x,), torch.tensor([1, 2])))
    del x
    assert gone() is None, "the slot has it"
    (up,), downs = links.sent_by(0)
    assert (up.micro_batch, up.labels.tolist(), downs) == (5, [1, 2], [])
    assert torch.equal(up.streams[0], sent)
    links.expect(1, (), ())
    assert links.sent_by(0) == ([], [])
