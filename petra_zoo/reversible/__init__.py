"""The reversible core, pure torch: the coupling, units, and backpropagation without stored activations."""

from petra_zoo.reversible.backprop import backpropagate, segments
from petra_zoo.reversible.coupling import advance, as_stream, couple, merge, snap, uncouple
from petra_zoo.reversible.memory import LiveBytes
from petra_zoo.reversible.plain_path import has_hooks, needs_plain_path
from petra_zoo.reversible.statistics import frozen_statistics
from petra_zoo.reversible.unit import CoupledUnit, FunctionUnit, Reversal, Streams, Unit

__all__ = [
    "CoupledUnit",
    "FunctionUnit",
    "LiveBytes",
    "Reversal",
    "Streams",
    "Unit",
    "advance",
    "as_stream",
    "backpropagate",
    "couple",
    "frozen_statistics",
    "has_hooks",
    "merge",
    "needs_plain_path",
    "segments",
    "snap",
    "uncouple",
]
