"""What a stage holds of the micro-batches in flight, in bytes: the part of its memory that depends on the method.

Peaks, counted as `LiveBytes` would count them from the units' profiles; what an allocator or a library's workspace adds
is not in them. A method, or a schedule of the planner, names one of these functions or brings its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from petra_zoo.petra.unit_profile import UnitProfile

Units = Sequence[UnitProfile]


@dataclass(frozen=True)
class Footprint:
    """Bytes of a stage.

    Attributes:
        graphs: what backward passes need: kept graphs, or the one that is rebuilt.
        inputs: kept for recomputation.
        versions: older parameters.
    """

    graphs: int
    inputs: int = 0
    versions: int = 0


# (units of a stage, micro-batches in flight in it with the one whose backward runs, versions of its parameters that
# were alive in their forwards) -> bytes
Keeps = Callable[[Units, int, int], Footprint]


def keeps_irreversible_inputs(units: Units, in_flight: int, versions: int) -> Footprint:
    """PETRA: FIFOs in front of units without an inverse, and at anchors; units go backward one at a time."""
    inputs = sum(unit.input_bytes for unit in units if unit.keeps_input)
    return Footprint(graphs=max(unit.working_bytes for unit in units), inputs=in_flight * inputs)


def keeps_stage_inputs(units: Units, in_flight: int, versions: int) -> Footprint:
    """DSP: the stage's inputs; its graph is built anew from the oldest."""
    return Footprint(graphs=_rebuilt(units), inputs=in_flight * units[0].input_bytes)


def keeps_graphs(units: Units, in_flight: int, versions: int) -> Footprint:
    """Backpropagation: the graph of every micro-batch, the oldest of which is being freed."""
    return Footprint(graphs=(in_flight - 1) * _graph(units) + _rebuilt(units))


def keeps_graphs_and_parameters(units: Units, in_flight: int, versions: int) -> Footprint:
    """Delayed gradients (weight stashing): graphs, the inputs they start from, and their parameters."""
    return Footprint(
        graphs=keeps_graphs(units, in_flight, versions).graphs,
        inputs=in_flight * units[0].input_bytes,
        versions=versions * sum(unit.parameter_bytes for unit in units),
    )


def keeps_unit_inputs(units: Units, in_flight: int, versions: int) -> Footprint:
    """Activation checkpointing: every unit's input, where it is not the output of the one below already."""
    made = list(accumulate(_made(unit) for unit in units))
    graphs = max(before + unit.working_bytes for before, unit in zip(made, units, strict=True))
    return Footprint(graphs=graphs, inputs=(in_flight - 1) * made[-1])


def _graph(units: Units) -> int:
    return sum(unit.graph_bytes for unit in units)


def _rebuilt(units: Units) -> int:
    """Peak while the stage's whole graph is built and freed again, unit by unit from the last."""
    built = accumulate(unit.graph_bytes for unit in units)
    return max(graph + max(0, unit.working_bytes - unit.graph_bytes) for graph, unit in zip(built, units, strict=True))


def _made(unit: UnitProfile) -> int:
    """Bytes of a unit's outputs that are not its input: a coupled block passes one of its two streams on."""
    return unit.output_bytes // 2 if unit.reversible else unit.output_bytes
