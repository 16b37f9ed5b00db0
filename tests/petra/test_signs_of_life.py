"""Data that is long in coming is no dead process."""

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from torch import Tensor

from petra_zoo.petra import Wire
from petra_zoo.petra.signs_of_life import awaited
from tests.petra.processes import own_world, run_processes
from tests.petra.test_pipeline import batches, make_model, make_pipeline, sgd

TIMEOUT, STALL = 2.0, 4.5  # seconds


def stalling(items: list[tuple[Tensor, Tensor]], at: int) -> Iterator[tuple[Tensor, Tensor]]:
    for i, item in enumerate(items):
        if i == at:
            time.sleep(STALL)
        yield item


def train_and_predict() -> tuple[int, int]:
    """Losses and predictions seen here, where training and evaluation stall."""
    world = replace(own_world(), wire=Wire(timeout=TIMEOUT))
    pipeline, data = make_pipeline(make_model(), 3, optimizer=sgd(0.02), world=world), batches(9)
    losses = 0
    feed = pipeline.links.awaited(stalling(data, 5) if world.first else [(None, None)] * len(data))
    for images, labels in feed:
        losses += pipeline.step(images, labels).loss is not None
    predictions = sum(1 for _ in pipeline.predict(stalling(data[:3], 0) if world.first else [], 3))
    losses += sum(output.loss is not None for output in pipeline.drain())
    pipeline.links.finish()
    return losses, predictions


@pytest.mark.dist
@pytest.mark.timeout(120)
def test_a_stall_of_the_data_is_longer_than_a_message_may_take(tmp_path: Path) -> None:
    assert run_processes(3, tmp_path, train_and_predict) == [(0, 0), (0, 0), (9, 3)]


def test_nothing_is_said_while_nobody_waits_for_data() -> None:
    said = []
    for _ in awaited(range(3), lambda: said.append(1), every=0.01):
        time.sleep(0.05)
    assert len(said) <= 3, "at most where one just began to wait"


def test_what_ends_the_items_ends_the_signs() -> None:
    said = []
    with pytest.raises(ZeroDivisionError):
        list(awaited((1 // n for n in (1, 0)), lambda: said.append(1), every=0.01))
    time.sleep(0.05)
    before = len(said)
    time.sleep(0.05)
    assert len(said) == before
