"""Which units at the end of a network keep their graph, because their bytes are free.

The memory of a reversible step peaks where its streams are widest, in the backward of the first layers. The graphs of
the last units are gone by then: as long as what is stored when the forward ends, and all the way back through those
units, stays below that peak, keeping them costs nothing and saves their recomputation.

How many fit is counted once per structure and shape of images, unit by unit on the meta device, where nothing is
computed: a function of the two alone, so that a resumed run goes on with the same bits.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from itertools import accumulate

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from petra_zoo.reversible.backprop import first_to_go_backward
from petra_zoo.reversible.live_bytes import LiveBytes
from petra_zoo.reversible.parts import parts_of
from petra_zoo.reversible.state import ModuleState
from petra_zoo.reversible.unit import CoupledUnit, Streams, Unit
from petra_zoo.reversible.vector_jacobian import Gradients, edge_of, gradients_of

BATCH = 2**12  # images, so many that what belongs to none of them, a weight's gradient, has no part in the choice
# Of the peak. Counted are activations in the type of the weights; under bfloat16 autocast on a GPU, graphs kept up to
# the counted peak raised the measured one by a fifth (benchmarks/gpu/kept_graphs.json against results.json).
_SHARE = 0.8
_MOST = 64  # structures and shapes that are remembered: those that were asked for last

_known: OrderedDict[Hashable, int] = OrderedDict()
_counting = threading.Lock()


def kept_units(units: Sequence[Unit], images: Tensor) -> int:
    """How many units at the end of a network keep their graph in a reversible step.

    Args:
        units: all of them, as they stand now.
        images: what they are given, [B, ...].
    """
    lowest = first_to_go_backward(units, (images,))
    key = (lowest, images.shape[1:], images.dtype, *(_structure(unit) for unit in units))
    with _counting:  # of threads that call one network one counts, and the others wait for it
        if key not in _known:  # counted however many others have been: what a process did before changes no bits
            _known[key] = _count(units, images, lowest)
            if len(_known) > _MOST:
                _known.popitem(last=False)
        _known.move_to_end(key)
        return _known[key]


def _count(units: Sequence[Unit], images: Tensor, lowest: int) -> int:
    known: dict[Hashable, _Counter] = {}
    counters: list[_Counter] = []
    try:
        # Whoever counts operations around the call counts the network's alone, and the network draws what it would.
        with _disable_current_modes(), torch.random.fork_rng([]):
            streams: Streams = (torch.empty(BATCH, *images.shape[1:], dtype=images.dtype, device="meta"),)
            for i, unit in enumerate(units):
                key = (_structure(unit), i > lowest, *((x.shape, x.dtype) for x in streams))
                if key not in known:
                    known[key] = _Counter(unit, streams, i > lowest)
                counters.append(known[key])
                streams = known[key].outputs
            return len(units) - _first_kept(counters, lowest)
    except Exception:  # a unit that cannot run without content: it looks at values, or calls a kernel of its own
        return 0


def _first_kept(counters: Sequence[_Counter], lowest: int) -> int:
    """The lowest unit from which on all can keep their graph without a higher peak than when none does."""
    largest = max(counter.graph for counter in counters)
    stored, peak = [0], 0  # by unit: what is stored in front of it
    for i, counter in enumerate(counters):
        stored.append(stored[i] + (counter.entering if counter.stores_input and i > lowest else 0))
        if i >= lowest and 2 * counter.graph > largest:  # the peak is among these
            peak = max(peak, stored[i + 1] + counter.backward(keeps_graph=False))
    first = len(counters)
    for s in range(len(counters) - 1, lowest - 1, -1):
        tail = counters[s:]
        below = accumulate((counter.graph for counter in tail[:-1]), initial=stored[s] + tail[0].entering)
        if any(x + counter.backward(keeps_graph=True) > _SHARE * peak for x, counter in zip(below, tail, strict=True)):
            break
        first = s
    return first


class _Counter:
    """Counts the bytes that a unit needs, and knows what it gives.

    Args:
        unit: on any device; it is left as it is.
        inputs: on the meta device.
        needs_input_gradient: whether a unit below it goes backward.

    Attributes:
        outputs: its streams, on the meta device.
        entering: bytes of its input.
        given: of its output.
        graph: of its graph, as far as it holds them: input and output only where it saved them.
        stores_input: whether its input stands until its backward; the end of a run is that of the unit behind it.
    """

    def __init__(self, unit: Unit, inputs: Streams, needs_input_gradient: bool) -> None:
        self._unit, self._inputs, self._needs_input_gradient = unit, inputs, needs_input_gradient
        self._state = ModuleState(unit)  # without what lies outside: the value of a coupling is read
        self._tensors = [
            x if x is None else torch.empty_like(x, device="meta", requires_grad=x.requires_grad)
            for x in self._state.tensors()
        ]
        self._own = [x for x in self._tensors if x is not None and x.requires_grad]
        self._peaks: dict[bool, int] = {}
        with self._state.holding(self._tensors), torch.enable_grad(), LiveBytes() as memory:
            streams, self._residue = unit.evaluate(*(x.clone() for x in self._leaves()))
            self.outputs: Streams = tuple(torch.empty_like(x, requires_grad=False) for x in streams)
            ends = [edge_of(x) for x in streams]
            del streams
            torch.empty(0, device="meta")  # counts anew: what the graph does not hold, its ends among it, died
        del ends
        self.entering, self.given = sum(x.nbytes for x in inputs), sum(x.nbytes for x in self.outputs)
        self.graph = memory.now - self.given
        self.stores_input = unit.anchor or not unit.reversible

    def backward(self, *, keeps_graph: bool) -> int:
        """Bytes at the peak of its backward: its graph or its output, as far as it has to be there, and gradients."""
        if keeps_graph not in self._peaks:
            gradients: Gradients = tuple(torch.empty_like(x) for x in self.outputs)
            with self._state.holding(self._tensors), LiveBytes() as memory:
                if keeps_graph:
                    self._through_graph(gradients)
                elif self._unit.reversible:
                    self._unit.frugal = True  # whatever the calls before have found: this is asked at the peak alone
                    self._unit.reverse(self.outputs, gradients, self._own, self._residue, owned=True)
                else:
                    self._unit.recompute(self._inputs, gradients, self._own, self._needs_input_gradient, owned=True)
            streams = self.given if self._unit.reversible and not keeps_graph else 0
            self._peaks[keeps_graph] = memory.peak + self.given + streams
        return self._peaks[keeps_graph]

    def _through_graph(self, gradients: Gradients) -> None:
        leaves = self._leaves()
        with torch.enable_grad():
            ends = [edge_of(x) for x in self._unit(*leaves)]
        gradients_of(ends, gradients, [*(x for x in leaves if x.requires_grad), *self._own])

    def _leaves(self) -> Streams:
        return tuple(
            x.detach().requires_grad_(self._needs_input_gradient and x.is_floating_point()) for x in self._inputs
        )


def _structure(unit: Unit) -> Hashable:
    """What a unit's memory depends on, beside its input."""
    state = unit.state
    coupled = (unit.coupling(), unit.starts, parts_of(unit.branch)) if isinstance(unit, CoupledUnit) else None
    tensors = tuple(x if x is None else (x.shape, x.dtype, x.requires_grad) for x in state.tensors())
    return type(unit), unit.reversible, unit.anchor, coupled, tuple(map(type, state.modules)), tensors
