"""Reversible networks in timm's registry; importing this package registers them, and those of extensions."""

from petra_zoo.extensions import load_entry_points
from petra_zoo.models import (
    petra_any,
    petra_beit,
    petra_deit,
    petra_eva,
    petra_revnet,
    petra_revnet_paper,
    petra_revvit,
    petra_vit,
)
from petra_zoo.models.coupled_layer import CoupledLayer
from petra_zoo.models.make_reversible import ReversibleChains
from petra_zoo.models.petra_beit import PetraBeit
from petra_zoo.models.petra_deit import PetraVitDistilled
from petra_zoo.models.petra_eva import PetraEva
from petra_zoo.models.petra_revnet import PetraRevNet
from petra_zoo.models.petra_revnet_paper import PetraPaperRevNet
from petra_zoo.models.petra_revvit import PetraRevViT
from petra_zoo.models.petra_vit import PetraVit
from petra_zoo.models.reversible_sequential import ReversibleSequential

__all__ = [
    "CoupledLayer",
    "PetraBeit",
    "PetraEva",
    "PetraPaperRevNet",
    "PetraRevNet",
    "PetraRevViT",
    "PetraVit",
    "PetraVitDistilled",
    "ReversibleChains",
    "ReversibleSequential",
    "petra_any",
    "petra_beit",
    "petra_deit",
    "petra_eva",
    "petra_revnet",
    "petra_revnet_paper",
    "petra_revvit",
    "petra_vit",
]

load_entry_points("petra_zoo.models")  # last: they build on what this package has
