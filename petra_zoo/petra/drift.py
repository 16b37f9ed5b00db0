"""Watching over reconstruction: how far what a stage reconstructs has drifted from what it received.

A stage inverts today's weights, not those of the micro-batch's forward. As long as they are close, so is what comes
out; where a learning rate or a delay is too large for that, a stage trains on what nobody has ever fed. Every so many
micro-batches this is measured, stage by stage, with no word to another process.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from petra_zoo.petra.messages import Up
from petra_zoo.petra.stage import Stage
from petra_zoo.petra.stage_state import copies
from petra_zoo.reversible import Streams

_log = logging.getLogger(__name__)


class DriftGuard:
    """Warns, once for each stage, where its reconstruction is off by more than a limit.

    A measured micro-batch costs a copy of its streams in every stage, and one more forward and reversal; in between
    nothing is done at all.

    Args:
        stages: of this process.
        every: measure every so many micro-batches.
        limit: of the relative error ||x~ - x|| / ||x|| of a stage's input, beyond what it is at unchanged weights.

    Attributes:
        errors: of the stages, by index: the latest error, and the one at unchanged weights.
    """

    def __init__(self, stages: Sequence[Stage], every: int, limit: float) -> None:
        self.stages = [stage for stage in stages if stage.sends_streams and stage.goes_backward]
        self.every, self.limit = every, limit
        self.errors: dict[int, tuple[float, float]] = {}
        self._warned: set[int] = set()
        self._received: dict[int, tuple[int, Streams, float]] = {}  # by stage: micro-batch, streams, error

    def feed(self, fed: int) -> None:
        """In front of a tick that feeds a micro-batch, `fed` of which have been so far."""
        if fed % self.every == 0 and not self._received:
            for stage in self.stages:
                stage.watcher = self

    def saw_forward(self, stage: Stage, up: Up) -> None:
        if stage.index not in self._received:
            error = _relative_error(_there_and_back(stage, up), up.streams)
            self._received[stage.index] = (up.micro_batch, copies(up.streams), error)

    def saw_backward(self, stage: Stage, micro_batch: int, inputs: Streams, gradients: dict[int, Tensor]) -> None:
        number, received, unchanged = self._received.get(stage.index, (-1, (), 0.0))
        if number != micro_batch:
            return
        del self._received[stage.index]
        stage.watcher = None
        error = _relative_error(inputs, received)
        self.errors[stage.index] = (error, unchanged)
        if not error <= unchanged + self.limit and stage.index not in self._warned:
            self._warned.add(stage.index)
            _log.warning(
                "stage %d reconstructs its input with a relative error of %.2g (%.2g at unchanged weights), more than "
                "drift_limit=%g: its gradients are of other activations; lower the learning rate, or the delay by "
                "accumulation_steps",
                stage.index,
                error,
                unchanged,
                self.limit,
            )


@torch.no_grad()
def _there_and_back(stage: Stage, up: Up) -> Streams:
    """A stage's input, reconstructed with the weights of its forward; leaves no trace."""
    streams, device = up.streams, up.streams[0].device
    trail = []
    with ExitStack() as stack:
        for unit in stage.units:
            stack.enter_context(unit.untouched())
        stack.enter_context(stage.precision(device))
        for i, unit in enumerate(stage.units):
            inputs = streams
            with stage.surroundings(i, up.micro_batch, device):
                streams, residue = unit.evaluate(*inputs)
            trail.append((inputs, residue))
        for i in reversed(range(len(stage.units))):
            unit, (inputs, residue) = stage.units[i], trail[i]
            if not unit.reversible or unit.anchor:
                streams = inputs
                continue
            with stage.surroundings(i, up.micro_batch, device):
                streams = unit.reverse(streams, (None,) * len(streams), [], residue).inputs
    return streams


def _relative_error(found: Streams, expected: Streams) -> float:
    """||found - expected|| / ||expected||, over all streams."""
    numbers = [[x.double().flatten() for x in streams] for streams in (found, expected)]
    ours, theirs = map(torch.cat, numbers)
    return float((ours - theirs).norm() / theirs.norm().clamp_min(torch.finfo(torch.float64).tiny))
