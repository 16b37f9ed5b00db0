"""Evaluation through a pipeline's stages: forward only, beside whatever is in flight."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from petra_zoo.errors import UserError
from petra_zoo.petra.links import Links
from petra_zoo.petra.messages import Up
from petra_zoo.petra.stage import precision
from petra_zoo.petra.world import World
from petra_zoo.reversible import Unit, UnitModel

Batches = Iterable[tuple[Tensor, Tensor]]


@torch.no_grad()
def predict(
    model: UnitModel,
    units: Sequence[Unit],
    batches: Batches,
    count: int | None,
    world: World,
    links: Links,
    stages: range,
    autocast: torch.dtype | None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Runs batches through this rank's units; see `Pipeline.predict`.

    Args:
        model: the units' model; its modes are as they were whenever the caller has control.
        units: of this rank's stages.
        batches: images and labels, on the rank that owns the stem.
        count: how many there are.
        world: this rank's place.
        links: of their own: the training's messages stay where they are.
        stages: this rank's.
        autocast: of the training.
    """
    if count is None and world.size > 1:
        raise UserError("predict() through several processes needs count=, the number of batches, on every rank")
    feed = iter(batches)
    links.expect(0, stages[:1], ())
    for number in itertools.count() if count is None else range(count):
        if count is None or number + 1 < count:  # posted a batch ahead: a receive must be there before its message
            links.expect(number + 1, stages[:1], ())
        if world.first:
            batch = next(feed, None)
            if batch is None and count is None:
                return
            if batch is None:
                raise UserError(f"predict() was promised count={count} batches and got {number}")
            up = Up(number, (batch[0],), batch[1])
        else:
            up = links.receive_up(stages[0])
        streams = up.streams
        with _evaluating(model), precision(world.device, autocast):
            for unit in units:
                streams = unit(*streams)
        if world.last:
            yield streams[0], up.labels
        else:
            links.send_up(stages[-1] + 1, Up(number, streams, up.labels))
    links.finish()


@contextmanager
def _evaluating(model: UnitModel) -> Iterator[None]:
    """Eval mode inside, the modes of before outside."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for m, training in modes:
            m.training = training
