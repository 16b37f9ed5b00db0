"""The PETRA engine: parallel end-to-end training with reversible architectures (arXiv 2406.02052)."""

from petra_zoo.petra.finite import NotFiniteError, first_not_finite
from petra_zoo.petra.links import LinkError, Wire
from petra_zoo.petra.partition import assign_stages, balance, count_operations
from petra_zoo.petra.pipeline import METHODS, Method, Output, Pipeline
from petra_zoo.petra.probes import Measurement, Probe
from petra_zoo.petra.profile import Profile, measure
from petra_zoo.petra.world import World, global_rank, join, leave, world_size

__all__ = [
    "METHODS",
    "LinkError",
    "Measurement",
    "Method",
    "NotFiniteError",
    "Output",
    "Pipeline",
    "Probe",
    "Profile",
    "Wire",
    "World",
    "assign_stages",
    "balance",
    "count_operations",
    "first_not_finite",
    "global_rank",
    "join",
    "leave",
    "measure",
    "world_size",
]
