"""Reversible networks in timm's registry; importing this package registers them, and those of extensions."""

from petra_zoo.extensions import load_entry_points
from petra_zoo.models import petra_revnet, petra_revnet_paper, petra_revvit
from petra_zoo.models.coupled_layer import CoupledLayer
from petra_zoo.models.petra_revnet import PetraRevNet
from petra_zoo.models.petra_revnet_paper import PetraPaperRevNet
from petra_zoo.models.petra_revvit import PetraRevViT

__all__ = [
    "CoupledLayer",
    "PetraPaperRevNet",
    "PetraRevNet",
    "PetraRevViT",
    "petra_revnet",
    "petra_revnet_paper",
    "petra_revvit",
]

load_entry_points("petra_zoo.models")  # last: they build on what this package has
