"""One kind of tick, captured: what it does on the device as a graph, and what it does on the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from petra_zoo.petra.clock import Clock
from petra_zoo.petra.cuda_graph import Graph
from petra_zoo.petra.generator import Draw, seed_of
from petra_zoo.petra.homes import Homes
from petra_zoo.petra.host_side import HostSide
from petra_zoo.petra.links import Links
from petra_zoo.petra.messages import Output, Up
from petra_zoo.petra.ring_places import RingPlaces
from petra_zoo.petra.stage import Stage
from petra_zoo.petra.tick import Lanes, run_tick


class Ticking(Protocol):
    """What of a pipeline a tick works on."""

    stages: list[Stage]
    links: Links
    clock: Clock


class CapturedTick:
    """A tick that can be replayed, as often as it is the same.

    Args:
        pipeline: whose tick it is.
        graph: an empty one.
        homes: where everything lies between two ticks.
        places: where the rings are.
        draws: of every seeding in the tick, in order, whether something is drawn; see `Draws`.
        outside: stages whose update is no part of it.
    """

    def __init__(
        self,
        pipeline: Ticking,
        graph: Graph,
        homes: Homes,
        places: RingPlaces,
        draws: Sequence[Draw | None],
        outside: set[int],
    ) -> None:
        self.pipeline, self.graph, self.homes, self.places = pipeline, graph, homes, places
        self.draws, self.outside = draws, outside
        self.before = HostSide.of(pipeline.stages, pipeline.links)
        self.output = Output()

    def capture(self, fed: Up) -> Output:
        """Captures the tick and does it.

        Args:
            fed: what the first stage receives.

        Raises:
            RuntimeError: it cannot be captured; nothing has happened.
        """
        self.fed, inputs = fed.micro_batch, self.homes.feed(fed)
        try:
            self.graph.capture(lambda lanes: self._work(inputs, lanes), self._seeds(fed), self.homes.widest)
        except BaseException:
            self.before.restore(self.pipeline.links)
            raise
        self.after = HostSide.of(self.pipeline.stages, self.pipeline.links)
        self.went_backward = [(stage, stage.last_backward) for stage in self.pipeline.stages]
        return self._do(fed)

    def finds_gradients(self) -> bool:
        """Whether the window's sums are the tensors that the graph adds to: nobody has put others there, or none."""
        return all(p.grad is gradient for p, gradient in self.before.gradients)

    def replay(self, fed: Up, again: bool) -> Output:
        """Does the tick; `again`: the previous tick was a replay of the same kind."""
        self.homes.feed(fed)
        for (stage, window, updates), (_, _, earlier) in zip(self.after.counters, self.before.counters, strict=True):
            stage.gradients_in_window = window
            stage.updates += updates - earlier
        for message, number in self.after.numbers:
            message.micro_batch = number + fed.micro_batch - self.fed
        for stage, number in self.went_backward:
            stage.last_backward = number + fed.micro_batch - self.fed
        for ring in self.places.rings:
            ring.turn()
        if not again:
            for p, gradient in self.after.gradients:
                p.grad = gradient
        return self._do(fed)

    def _work(self, inputs: Up, lanes: Lanes) -> None:
        """The tick, and then whatever lives on is moved to where it was found."""
        pipeline = self.pipeline

        def update(stage: Stage) -> None:
            if stage.index not in self.outside:
                stage.update()

        with self.places.used():
            self.output = run_tick(pipeline.stages, pipeline.links, pipeline.clock, inputs, lanes, update)
            if self.output.labels is not None:
                self.output.labels = self.output.labels.clone()  # they lie where the next ones move in
            self.homes.settle(pipeline.links)

    def _do(self, fed: Up) -> Output:
        """Does on the device what has happened on the host."""
        self.graph.replay(self._seeds(fed))
        output = self.output
        number = None if output.micro_batch is None else output.micro_batch + fed.micro_batch - self.fed
        return Output(number, *(x if x is None else x.clone() for x in (output.loss, output.logits, output.labels)))

    def _seeds(self, fed: Up) -> list[int | None]:
        return [None if draw is None else seed_of(*draw[:2], fed.micro_batch - draw[2]) for draw in self.draws]
