"""Reversible networks in timm's registry; importing this package registers them, and those of extensions."""

from petra_zoo.extensions import load_entry_points
from petra_zoo.models import petra_any, petra_revnet, petra_revnet_paper
from petra_zoo.models.coupled_layer import CoupledLayer
from petra_zoo.models.make_reversible import ReversibleChains
from petra_zoo.models.petra_revnet import PetraRevNet
from petra_zoo.models.petra_revnet_paper import PetraPaperRevNet

__all__ = [
    "CoupledLayer",
    "PetraPaperRevNet",
    "PetraRevNet",
    "ReversibleChains",
    "petra_any",
    "petra_revnet",
    "petra_revnet_paper",
]

load_entry_points("petra_zoo.models")  # last: they build on what this package has
