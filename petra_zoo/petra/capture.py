"""Captured ticks: a steady tick replayed as a CUDA graph.

When every stage goes forward and backward, a tick is the same work on the same memory every time: only what is fed, the
random numbers and the learning rates differ. The kind of a tick is how full the stages' windows are: k kinds. Of each
kind a few ticks run as ever; one is watched for what the host reads; the next one is captured; from then on it is
replayed. What lives from tick to tick lies in `Homes` and `Ring`s. Everything else (filling and draining, a smaller
last batch, probes, evaluation) runs uncaptured on the same state, and whatever replaces a tensor drops the graphs.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.nn import SyncBatchNorm

from petra_zoo.errors import UserError
from petra_zoo.petra.ancestors import GraphStage
from petra_zoo.petra.captured_tick import CapturedTick, Ticking
from petra_zoo.petra.change_watch import ChangeWatch
from petra_zoo.petra.coasting import CoastingByStep
from petra_zoo.petra.cuda_graph import CudaGraph, Device, Graph
from petra_zoo.petra.generator import Draw, Draws, own_generators, seeded_by
from petra_zoo.petra.homes import Homes
from petra_zoo.petra.host_reads import HostReads
from petra_zoo.petra.host_side import rings_of
from petra_zoo.petra.messages import Output, Up
from petra_zoo.petra.rates import numbers_of
from petra_zoo.petra.ring_places import RingPlaces
from petra_zoo.petra.stage import Stage
from petra_zoo.petra.tick import run_tick
from petra_zoo.petra.world import World

_log = logging.getLogger(__name__)

MakeGraph = Callable[[], Graph]
Graphs = Literal["auto", "off"] | MakeGraph
_Windows = tuple[int, ...]  # gradients in the window of every stage, before a tick
_PLAIN = 2  # ticks of a kind that run as ever before one is watched: optimizers and libraries settle in them
_OTHER_FORMS = 8  # ticks in a row whose micro-batches have another form: then they are what there is


def graphs_for(graphs: Graphs, world: World, *, delayed: bool, stages: int) -> MakeGraph | None:
    """What makes the graphs of a pipeline; None where its ticks are not captured.

    Raises:
        UserError: an unknown setting.
    """
    if callable(graphs):
        return graphs
    if graphs not in ("auto", "off"):
        raise UserError(f"graphs is 'auto', 'off' or what makes a graph, not {graphs!r}")
    if graphs == "off" or world.device.type != "cuda" or world.size > 1:
        return None
    return partial(CudaGraph, Device(world.device, lanes=stages if delayed else 1))


class CapturedTicks:
    """Runs the ticks of a pipeline in one process, captured where they can be.

    Args:
        pipeline: whose.
        make_graph: an empty graph, on the device of the pipeline.
        device: that device.

    Attributes:
        refusal: why nothing is captured, where that is so.
        outside: stages whose updates are not.
        replayed: how many ticks were.
    """

    def __init__(self, pipeline: Ticking, make_graph: MakeGraph, device: torch.device) -> None:
        self.pipeline, self.make_graph, self.device = pipeline, make_graph, device
        self.replayed = 0
        self.outside = {stage.index for stage in pipeline.stages if not _may_update_inside(stage)}
        self._watched = ChangeWatch.of(pipeline.stages)
        self._said = False
        self.forget()
        self.refusal: str | None = None
        if why := why_never(pipeline.stages):
            self._refuse(why)

    def forget(self) -> None:
        """Drops all graphs, and where they had everything."""
        self.ticks: dict[_Windows, CapturedTick] = {}
        self._homes = Homes()
        self._places: RingPlaces | None = None
        self._before: Counter[_Windows] = Counter()  # how many ticks of a kind have run uncaptured
        self._draws: dict[_Windows, list[Draw | None]] = {}
        self._last: CapturedTick | None = None  # where the previous tick was captured
        self._odd = 0

    def run(self, fed: Up | None) -> Output:
        """The tick that the pipeline's clock shows."""
        if not self.refusal and self._watched.changed():
            self.forget()
        if self.refusal or fed is None or not self._steady() or not self._in_form(fed):
            return self._uncaptured(fed)
        kind = tuple(stage.gradients_in_window for stage in self.pipeline.stages)
        if kind in self.ticks:
            tick = self.ticks[kind]
            return self._replay(tick, fed) if tick.finds_gradients() else self._uncaptured(fed)
        if not all(stage.window.holds(p) for stage in self.pipeline.stages for p in stage.own_parameters()):
            return self._uncaptured(fed)
        self._before[kind] += 1
        if self._before[kind] <= _PLAIN:
            return self._uncaptured(fed)
        if kind not in self._draws:
            return self._rehearse(kind, fed)
        return self._capture(kind, fed)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Inside, stages may update in between two ticks; outside, the graphs are still there."""
        if self._watched.changed():
            self.forget()
        yield
        self._last = None
        self._watched.look()

    # -- uncaptured -----------------------------------------------------------------------------------------------

    def _uncaptured(self, fed: Up | None) -> Output:
        pipeline = self.pipeline
        with own_generators(self.device):
            return self._left(run_tick(pipeline.stages, pipeline.links, pipeline.clock, fed))

    def _left(self, output: Output) -> Output:
        """What a tick gives that was not captured; the next one that is begins with moving everything in."""
        if output.labels is not None and self.ticks:
            output.labels = output.labels.clone()  # they may lie where others will move in
        self._last = None
        if not self.refusal:
            self._watched.look()  # an update counts as a modification of the parameters
        return output

    def _steady(self) -> bool:
        if self._watched.hooked or not self.pipeline.clock.steady:
            return False
        return not any(stage.watcher or any(stage.residues) for stage in self.pipeline.stages)

    def _in_form(self, fed: Up) -> bool:
        """Whether all micro-batches in flight have the size of this one, and what there is the form it had."""
        if self._last:  # all others were in form a tick ago
            return self._homes.fits(fed)
        images = len(fed.streams[0])
        kept = {size for ring in rings_of(self.pipeline.stages) for size in ring.images}
        fits = kept <= {images} and self._homes.fits(fed) and self._homes.fit(self.pipeline.links, images)
        self._odd = 0 if fits else self._odd + 1
        if self._odd > _OTHER_FORMS:
            self.forget()
        return fits

    def _rehearse(self, kind: _Windows, fed: Up) -> Output:
        """A tick as ever, watched: what does it draw, and what would be lost if it were replayed?"""
        draws, reads = Draws(self.device, fed.micro_batch), HostReads(couplings(self.pipeline.stages))

        def update(stage: Stage) -> None:
            before, numbers = len(reads.found), numbers_of(stage.optimizer)
            stage.update()
            counts = ["counts in plain numbers"] if numbers != numbers_of(stage.optimizer) else []
            if stage.index not in self.outside and (why := [*reads.found[before:], *counts]):
                self.outside.add(stage.index)
                stage.rates = None
                self._say_outside(stage, why[0])
            del reads.found[before:]

        pipeline = self.pipeline
        self._set_rates()
        with own_generators(self.device), seeded_by(draws), reads:
            output = run_tick(pipeline.stages, pipeline.links, pipeline.clock, fed, update=update)
            draws.look()
        self._draws[kind] = draws.found
        output = self._left(output)
        if reads.found:
            self._refuse(f"in the network or the loss, {reads.found[0]}")
        return output

    # -- captured -------------------------------------------------------------------------------------------------

    def _capture(self, kind: _Windows, fed: Up) -> Output:
        places = self._settle()
        tick = CapturedTick(
            self.pipeline, self.make_graph(), self._homes, places, self._draws[kind], self.outside.copy()
        )
        try:
            output = tick.capture(fed)
        except RuntimeError as error:
            _log.debug("the capture failed", exc_info=True)
            cause = error.__context__ or error  # ending a capture that has failed is another error
            self._refuse(str(cause).strip().splitlines()[0])
            return self._uncaptured(fed)
        self.ticks[kind] = tick
        self._watched.look()  # what is queued counts as a modification, when it is replayed it does not
        return self._finish(tick, output)

    def _replay(self, tick: CapturedTick, fed: Up) -> Output:
        self._settle()
        return self._finish(tick, tick.replay(fed, again=tick is self._last and not self.outside))

    def _settle(self) -> RingPlaces:
        """Brings everything to where the graphs find it."""
        self._set_rates()
        places = self._places = self._places or RingPlaces(rings_of(self.pipeline.stages), self.device)
        if self._last is None:  # the previous tick was no captured one
            self._homes.settle(self.pipeline.links)
            places.set()
        return places

    def _set_rates(self) -> None:
        """Has the device know the learning rates in front of a tick: in one, they would move there from the host."""
        for stage in self.pipeline.stages:
            if stage.rates:
                stage.rates.refresh()

    def _finish(self, tick: CapturedTick, output: Output) -> Output:
        """Updates outside of the graph, where they cannot be in it."""
        self._last = tick
        self.replayed += 1
        if self.outside:
            with own_generators(self.device):
                for stage in reversed(self.pipeline.stages):
                    if stage.index in self.outside and stage.update():
                        across = stage.settings.across is not None
                        self._say_outside(stage, "averages over replicas" if across else "reads or counts on the host")
            self._watched.look()
        return output

    # -- what cannot be captured ----------------------------------------------------------------------------------

    def _refuse(self, why: str) -> None:
        self.refusal = why
        self.forget()
        _log.warning("ticks run without CUDA graphs: %s", why)

    def _say_outside(self, stage: Stage, why: str) -> None:
        if not self._said:
            _log.warning("%s updates outside of the CUDA graphs: it %s", type(stage.optimizer).__name__, why)
        self._said = True


def couplings(stages: Sequence[Stage]) -> Iterator[Tensor]:
    """The numbers that units read from buffers of their layers: watched, so that no graph outlives a change."""
    for stage in stages:
        for unit in stage.units:
            yield from (x for module in unit.outside for x in module.buffers(recurse=False) if x.ndim == 0)


def why_never(stages: Sequence[Stage]) -> str | None:
    """Why ticks of these stages cannot be captured, whatever runs in them."""
    for stage in stages:
        if not vars(type(stage)).get("capturable"):  # of its own: what it inherits does not speak for it
            return f"{type(stage).__name__} may keep what no graph knows of, for it does not say that it is capturable"
        if isinstance(stage, GraphStage) and stage.stash:
            return "graphs of autograd are kept from tick to tick"
        if stage.settings.across and any(isinstance(m, SyncBatchNorm) for unit in stage.units for m in unit.modules()):
            return "batch norms wait for other replicas"
        if stage.prediction and not isinstance(stage.prediction.coasting, CoastingByStep):
            return "weights are predicted by learning rates and counts that the host reads"
    return None


def _may_update_inside(stage: Stage) -> bool:
    """Before anything has been tried."""
    return stage.settings.across is None and (stage.optimizer is None or stage.rates is not None)
