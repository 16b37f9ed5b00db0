"""One tick: every stage runs the forward of a young micro-batch and the backward of an older one, then the updates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from petra_zoo.petra.clock import Clock
from petra_zoo.petra.links import Links
from petra_zoo.petra.messages import Down, Output, Up
from petra_zoo.petra.stage import Stage


class Lanes(Protocol):
    """Where the work of stages is queued: with delay, those of one tick do not wait for each other."""

    def of(self, stage: int) -> AbstractContextManager[None]:
        """Inside, work goes to the lane of a stage."""

    def join(self) -> None:
        """What is queued from now on waits for all lanes."""


class InLine:
    """All work in one line."""

    def of(self, stage: int) -> AbstractContextManager[None]:
        return nullcontext()

    def join(self) -> None:
        pass


def run_tick(
    stages: Sequence[Stage],
    links: Links,
    clock: Clock,
    fed: Up | None,
    lanes: Lanes | None = None,
    update: Callable[[Stage], object] = lambda stage: stage.update(),
) -> Output:
    """The tick that the clock shows.

    Links are queues: what was sent in the previous tick is received before what is sent in this one, so with delay
    the order of the stages changes nothing. Without it messages of this very tick are received: forwards must climb
    from the first stage and backwards descend from the last. Updates come last: a tick has one theta_j per stage.

    Args:
        stages: this rank's, in order.
        links: between them, and to other ranks.
        clock: says which of them work.
        fed: what the first stage receives.
        lanes: where the work of a stage is queued; default: in line.
        update: what updates a stage; default: the stage itself.
    """
    lanes, output = lanes or InLine(), Output()
    for stage in stages:  # forwards; the last stage goes backward at once
        if not clock.forward(stage.index):
            continue
        up = fed if stage.index == 0 else links.receive_up(stage.index, stage.keeps_received)
        assert up is not None
        with lanes.of(stage.index), stage.gate.forward():
            if stage.last:
                down, loss, logits = stage.forward_backward(up)
                output = Output(up.micro_batch, loss, logits, up.labels)
                _send_down(links, stage, down)
            else:
                links.send_up(stage.index + 1, stage.forward(up))
    for stage in reversed(stages):  # backwards, with the parameters the forwards used
        if not stage.last and clock.backward(stage.index):
            with lanes.of(stage.index):
                _send_down(links, stage, stage.backward(links.receive_down(stage.index)))
    for stage in reversed(stages):  # what is not finite came down: the first to find it is where it began
        with lanes.of(stage.index):
            update(stage)
    lanes.join()
    return output


def _send_down(links: Links, stage: Stage, down: Down) -> None:
    if stage.sends_gradients:
        links.send_down(stage.index - 1, down)
