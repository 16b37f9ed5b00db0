"""The PETRA engine: parallel end-to-end training with reversible architectures (arXiv 2406.02052)."""

from petra_zoo.petra.counting import count_operations
from petra_zoo.petra.finite import NotFiniteError, first_not_finite
from petra_zoo.petra.graphed import GraphedStep
from petra_zoo.petra.layout import Costs, Layout, assign_stages, balance
from petra_zoo.petra.links import LinkError, Wire
from petra_zoo.petra.measuring import measure
from petra_zoo.petra.messages import Output
from petra_zoo.petra.methods import METHODS, Method, find_method, register_method
from petra_zoo.petra.optimization import Optimization, WeightPrediction
from petra_zoo.petra.pipeline import Pipeline
from petra_zoo.petra.probes import Measurement, Probe
from petra_zoo.petra.profile import Profile
from petra_zoo.petra.world import World, global_rank, join, leave, world_size

__all__ = [
    "METHODS",
    "Costs",
    "GraphedStep",
    "Layout",
    "LinkError",
    "Measurement",
    "Method",
    "NotFiniteError",
    "Optimization",
    "Output",
    "Pipeline",
    "Probe",
    "Profile",
    "WeightPrediction",
    "Wire",
    "World",
    "assign_stages",
    "balance",
    "count_operations",
    "find_method",
    "first_not_finite",
    "global_rank",
    "join",
    "leave",
    "measure",
    "register_method",
    "world_size",
]
