"""Installed as petra_zoo.converters: from trained networks to reversible ones.

`petra_zoo.models.PetraRevNet.from_resnet` already makes the coupled copy that computes the same (coupling 0).
"""

from petra_zoo.models import PetraRevNet

__all__ = ["PetraRevNet"]
