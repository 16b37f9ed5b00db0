"""The PETRA engine: parallel end-to-end training with reversible architectures (arXiv 2406.02052)."""

from petra_zoo.petra.partition import assign_stages, balance, count_operations
from petra_zoo.petra.pipeline import METHODS, Method, Output, Pipeline
from petra_zoo.petra.probes import Measurement, Probe
from petra_zoo.petra.profile import Profile, measure

__all__ = [
    "METHODS",
    "Measurement",
    "Method",
    "Output",
    "Pipeline",
    "Probe",
    "Profile",
    "assign_stages",
    "balance",
    "count_operations",
    "measure",
]
