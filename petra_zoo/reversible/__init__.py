"""The reversible core, pure torch: the coupling, units, and backpropagation without stored activations."""

from petra_zoo.reversible.backprop import backpropagate, segments
from petra_zoo.reversible.coupling import (
    COUPLING_STEPS,
    advance,
    as_stream,
    check_range,
    couple,
    merge,
    nearest_coupling,
    readable,
    snap,
    uncouple,
)
from petra_zoo.reversible.live_bytes import LiveBytes
from petra_zoo.reversible.plain_path import has_hooks, needs_plain_path
from petra_zoo.reversible.state import untouched
from petra_zoo.reversible.unit import (
    CoupledUnit,
    Evaluation,
    FunctionUnit,
    Gradients,
    Residue,
    Reversal,
    Streams,
    Unit,
    as_weights,
    gradients_of,
)
from petra_zoo.reversible.unit_model import UnitModel, units_of

__all__ = [
    "COUPLING_STEPS",
    "CoupledUnit",
    "Evaluation",
    "FunctionUnit",
    "Gradients",
    "LiveBytes",
    "Residue",
    "Reversal",
    "Streams",
    "Unit",
    "UnitModel",
    "advance",
    "as_stream",
    "as_weights",
    "backpropagate",
    "check_range",
    "couple",
    "gradients_of",
    "has_hooks",
    "merge",
    "nearest_coupling",
    "needs_plain_path",
    "readable",
    "segments",
    "snap",
    "uncouple",
    "units_of",
    "untouched",
]
