"""Reversible networks in timm's registry; importing this package registers them."""

from petra_zoo.models import petra_revnet
from petra_zoo.models.coupled_layer import CoupledLayer
from petra_zoo.models.petra_revnet import PetraRevNet

__all__ = ["CoupledLayer", "PetraRevNet", "petra_revnet"]
