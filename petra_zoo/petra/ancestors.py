"""Stages of PETRA's buffered ancestors: they differ from PETRA only in what they keep."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from petra_zoo.petra.cast_weights import CastWeights
from petra_zoo.petra.fifo import Fifo, filled
from petra_zoo.petra.messages import Down, Up
from petra_zoo.petra.optimization import State
from petra_zoo.petra.part import Part, StageSettings
from petra_zoo.petra.stage import Stage, leaves
from petra_zoo.petra.stage_state import copies
from petra_zoo.reversible import Gradients, Streams
from petra_zoo.reversible.hooks import through_hooks
from petra_zoo.reversible.state import version_of


class BufferedStage(Stage):
    """DSP (Xu, Huo, Huang, CVPR 2020): keeps the stage's input and re-runs the stage with the current parameters."""

    capturable = True

    def __init__(self, part: Part, settings: StageSettings) -> None:
        super().__init__(part, settings)
        self.inputs = self.make_fifo()

    @property
    def kept(self) -> Sequence[Fifo]:
        return [self.inputs]

    @property
    def keeps_received(self) -> bool:
        return not self.last

    def forward(self, up: Up) -> Up:
        if self.watcher:
            self.watcher.saw_forward(self, up)
        if self.goes_backward:
            self.inputs.append(up.streams)
        with torch.no_grad(), self.predicted_weights():
            return Up(up.micro_batch, self.run_units(up.streams, up.micro_batch), up.labels)

    def _reverse(self, micro_batch: int, streams: Streams, gradients: Gradients) -> Down:
        kept = self.inputs.popleft()  # exact, where PETRA would reconstruct
        inputs = leaves(kept, needs_gradient=self.sends_gradients)
        with torch.enable_grad(), ExitStack() as stack:
            for unit in self.units:
                stack.enter_context(unit.untouched())
            outputs = self.run_units(inputs, micro_batch)
        gradients, found = self._vector_jacobian(outputs, gradients, inputs)
        return self._finish_backward(micro_batch, kept, gradients, found)

    def in_flight_state(self) -> State:
        return {"inputs": list(self.inputs)}

    def load_in_flight_state(self, state: State) -> None:
        self.inputs = filled(self.make_fifo, state["inputs"])


@dataclass
class _Graph:
    micro_batch: int
    inputs: Streams
    outputs: Streams
    parameters: list[Tensor]  # the version the graph was built with


class _MadeOf(NamedTuple):
    """What the weights of a forward depend on within a window.

    Attributes:
        written: how often somebody has written into the parameters.
        rates: the learning rates, by which weights are predicted.
        updates_ahead: how far they are predicted: one more update may fit in before they are looked at again.
    """

    written: list[int]
    rates: list[float]
    updates_ahead: int


class GraphStage(Stage):
    """Keeps the graph of the forward: plain backpropagation where there is no delay.

    With a delay it must keep the parameters too, one copy per version in flight (PipeDream's weight stashing): the
    classic delayed gradient, taken at the old input and the old parameters, that updates the current ones.

    Args:
        stash: whether parameters change between a micro-batch's forward and its backward.
    """

    capturable = True

    def __init__(self, part: Part, settings: StageSettings, stash: bool = False) -> None:
        super().__init__(part, settings)
        self.stash = stash and not self.last
        if self.stash:  # the version that a graph was built of is what autocast has to cast
            self.casts = CastWeights(self.units, None)
        self.graphs: deque[_Graph] = deque()
        self._version: list[Tensor] | None = None
        self._made_of: _MadeOf | None = None  # that version

    @property
    def keeps_received(self) -> bool:
        return self.stash

    def forward(self, up: Up) -> Up:
        if self.watcher:
            self.watcher.saw_forward(self, up)
        with self.predicted_weights():
            graph = self._build(up.micro_batch, up.streams, self._parameters_now())
        if self.goes_backward:
            self.graphs.append(graph)
        return Up(up.micro_batch, tuple(x.detach() for x in graph.outputs), up.labels)

    def _reverse(self, micro_batch: int, streams: Streams, gradients: Gradients) -> Down:
        graph = self.graphs.popleft()
        parameters = graph.parameters if self.stash else None
        gradients, found = self._vector_jacobian(graph.outputs, gradients, graph.inputs, parameters)
        if self.stash:  # found at copies, of which hooks of the parameters know nothing
            for p in self.own_parameters():
                if id(p) in found:
                    found[id(p)] = through_hooks(p, found[id(p)])
        return self._finish_backward(micro_batch, (), gradients, found)

    def update(self, partial: bool = False) -> bool:
        updated = super().update(partial)
        if updated:
            self._version = None  # the next forward copies the parameters anew
        return updated

    def _parameters_now(self) -> list[Tensor]:
        own = self.own_parameters()
        if not self.stash:  # forward and backward in one tick: the parameters themselves are still those of the forward
            return list(own)
        made_of = self._made_of_now()
        if self._version is None or self._made_of != made_of:
            self._version, self._made_of = [p.detach().clone().requires_grad_() for p in own], made_of
        return self._version

    def _made_of_now(self) -> _MadeOf:
        written = [version_of(p) for p in self.own_parameters()]
        if self.prediction is None or self.optimizer is None:
            return _MadeOf(written, [], 0)
        rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        return _MadeOf(written, rates, self.prediction.updates(self.gradients_in_window))

    def _build(self, micro_batch: int, streams: Streams, parameters: list[Tensor]) -> _Graph:
        inputs = streams = leaves(streams, needs_gradient=self.sends_gradients)
        with torch.enable_grad():
            streams = (
                self._run_with(parameters, streams, micro_batch) if self.stash else self.run_units(streams, micro_batch)
            )
        return _Graph(micro_batch, inputs, streams, parameters)

    def _run_with(self, parameters: list[Tensor], streams: Streams, micro_batch: int) -> Streams:
        """Runs the units with other parameters than their own."""
        copied = {id(p): copy for p, copy in zip(self.own_parameters(), parameters, strict=True)}
        device = streams[0].device
        with self.precision(device):
            for i, unit in enumerate(self.units):
                used = [copied.get(id(x), x) for x in unit.state.tensors()]
                with self.surroundings(i, micro_batch, device), unit.state.holding(used):
                    streams = unit(*streams)
        return streams

    def in_flight_state(self) -> State:
        """Graphs cannot be saved: their inputs and parameters can, once per version."""
        versions: list[list[Tensor]] = []
        entries = []
        for graph in self.graphs:
            index = next((i for i, version in enumerate(versions) if version is graph.parameters), len(versions))
            if index == len(versions):
                versions.append(graph.parameters)
            entries.append((graph.micro_batch, tuple(x.detach() for x in graph.inputs), index))
        lasts = self._made_of is not None and self._made_of == self._made_of_now()
        current = next((i for i, version in enumerate(versions) if version is self._version and lasts), None)
        detached = [[p.detach() for p in version] for version in versions]
        ahead = self._made_of.updates_ahead if self._made_of else 0
        return {"versions": detached, "graphs": entries, "current": current, "updates_ahead": ahead}

    def load_in_flight_state(self, state: State) -> None:
        versions = [[p.detach().clone().requires_grad_() for p in version] for version in state["versions"]]
        self._version = None if state["current"] is None else versions[state["current"]]
        self._made_of = self._made_of_now()._replace(updates_ahead=state.get("updates_ahead", 0))
        self.graphs = deque()
        with ExitStack() as stack:  # the forward that built these graphs has updated the statistics already
            for unit in self.units:
                stack.enter_context(unit.untouched())
            for micro_batch, inputs, index in state["graphs"]:
                self.graphs.append(self._build(micro_batch, copies(inputs), versions[index]))
