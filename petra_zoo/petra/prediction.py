"""Evaluation through a pipeline's stages: forward only, beside whatever is in flight."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from petra_zoo.errors import UserError
from petra_zoo.petra.cast_weights import precision
from petra_zoo.petra.layout import Layout
from petra_zoo.petra.links import Wire
from petra_zoo.petra.messages import Up
from petra_zoo.petra.preparing import Images, Prepare, fed_streams, prepared_units
from petra_zoo.petra.process_links import make_links
from petra_zoo.petra.world import World
from petra_zoo.reversible import UnitModel, units_of

Batches = Iterable[tuple[Images, Tensor]]


@torch.no_grad()
def predict_batches(
    model: UnitModel,
    batches: Batches,
    count: int | None,
    layout: Layout,
    world: World,
    autocast: torch.dtype | None,
    running: bool,
    prepare: Prepare | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Runs batches through a model's stages, forward only; see `Pipeline.predict`.

    Args:
        model: whose units run; its modes are as they were whenever the caller has control.
        batches: images and labels, on the rank that owns the stem.
        count: how many there are.
        layout: of the training.
        world: this rank's place.
        autocast: of the training.
        running: whether the training's first tick is over.
        prepare: of the training: what is done to images in front of the first unit.

    Raises:
        UserError: nobody says how many batches there are, or there are fewer.
    """
    if count is None and world.size > 1:
        raise UserError("predict() through several processes needs count=, the number of batches, on every rank")
    units, stages = prepared_units(units_of(model), prepare), layout.ranks[world.rank]
    own = [units[i] for i in layout.units_of_rank(world.rank)]
    # Of their own, so that the training's messages stay where they are. Nothing is rounded on the way: the model is
    # evaluated, not the wire.
    links = make_links(world, stages, Wire(timeout=world.wire.timeout), evaluation=True, running=running)
    feed = iter(links.awaited(batches))
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
            up = Up(number, fed_streams(batch[0]), batch[1])
        else:
            up = links.receive_up(stages[0])
        streams = up.streams
        with _evaluating(model), precision(world.device, autocast):
            for unit in own:
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
