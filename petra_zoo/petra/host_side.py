"""The host's side of a tick: counters, queues and gradients, which a replay on the device does not move."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from petra_zoo.petra.fifo import Mark, Ring
from petra_zoo.petra.links import Links
from petra_zoo.petra.messages import Down, Up
from petra_zoo.petra.stage import Stage


@dataclass(frozen=True)
class HostSide:
    """How the host saw a pipeline between two ticks.

    Attributes:
        counters: of every stage: gradients in its window, updates made.
        gradients: of every parameter.
        ups, downs: messages by receiving stage.
        numbers: the micro-batches of these messages.
        rings: those in use, and where each was.
    """

    counters: list[tuple[Stage, int, int]]
    gradients: list[tuple[nn.Parameter, Tensor | None]]
    ups: dict[int, list[Up]]
    downs: dict[int, list[Down]]
    numbers: list[tuple[Up | Down, int]]
    rings: list[tuple[Ring, Mark]]

    @classmethod
    def of(cls, stages: Sequence[Stage], links: Links) -> HostSide:
        """How it is now."""
        ups = {j: list(queue) for j, queue in links.ups.items()}
        downs = {j: list(queue) for j, queue in links.downs.items()}
        messages: list[Up | Down] = [up for held in ups.values() for up in held]
        messages += [down for held in downs.values() for down in held]
        return cls(
            [(stage, stage.gradients_in_window, stage.updates) for stage in stages],
            [(p, p.grad) for stage in stages for p in stage.own_parameters()],
            ups,
            downs,
            [(message, message.micro_batch) for message in messages],
            [(ring, ring.mark()) for ring in rings_of(stages)],
        )

    def restore(self, links: Links) -> None:
        """Puts everything back."""
        for stage, window, updates in self.counters:
            stage.gradients_in_window, stage.updates = window, updates
        for p, gradient in self.gradients:
            p.grad = gradient
        for j, ups in self.ups.items():
            links.ups[j] = deque(ups)
        for j, downs in self.downs.items():
            links.downs[j] = deque(downs)
        for message, number in self.numbers:
            message.micro_batch = number
        for ring, mark in self.rings:
            ring.return_to(mark)


def rings_of(stages: Sequence[Stage]) -> list[Ring]:
    """The rings in use."""
    return [kept for stage in stages for kept in stage.kept if isinstance(kept, Ring) and len(kept)]
