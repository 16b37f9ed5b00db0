"""The reversible core, pure torch: the coupling, units, and backpropagation without stored activations."""

from petra_zoo.reversible.backprop import backpropagate, segments
from petra_zoo.reversible.compiled import BranchBlock, CallsBranches, CompileOptions, compile_branches, run_branch
from petra_zoo.reversible.coupling import (
    COUPLING_STEPS,
    advance,
    couple,
    coupled,
    merge,
    merge_streams,
    nearest_coupling,
    uncouple,
)
from petra_zoo.reversible.dispatches import Dispatches
from petra_zoo.reversible.forked_unit import ForkedUnit
from petra_zoo.reversible.kept_graphs import kept_units
from petra_zoo.reversible.live_bytes import LiveBytes
from petra_zoo.reversible.ownership import Lent
from petra_zoo.reversible.plain_path import needs_plain_path
from petra_zoo.reversible.reading import Coupling, readable
from petra_zoo.reversible.state import untouched
from petra_zoo.reversible.stream_type import FLOAT_STREAMS, StreamKind, StreamType
from petra_zoo.reversible.unit import (
    CoupledUnit,
    Evaluation,
    FunctionUnit,
    Residue,
    Reversal,
    Streams,
    Unit,
)
from petra_zoo.reversible.unit_model import UnitModel, units_of
from petra_zoo.reversible.vector_jacobian import Gradients, gradients_of

__all__ = [
    "COUPLING_STEPS",
    "FLOAT_STREAMS",
    "BranchBlock",
    "CallsBranches",
    "CompileOptions",
    "CoupledUnit",
    "Coupling",
    "Dispatches",
    "Evaluation",
    "ForkedUnit",
    "FunctionUnit",
    "Gradients",
    "Lent",
    "LiveBytes",
    "Residue",
    "Reversal",
    "StreamKind",
    "StreamType",
    "Streams",
    "Unit",
    "UnitModel",
    "advance",
    "backpropagate",
    "compile_branches",
    "couple",
    "coupled",
    "gradients_of",
    "kept_units",
    "merge",
    "merge_streams",
    "nearest_coupling",
    "needs_plain_path",
    "readable",
    "run_branch",
    "segments",
    "uncouple",
    "units_of",
    "untouched",
]
