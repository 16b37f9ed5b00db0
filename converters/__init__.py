"""Installed as petra_zoo.converters: from trained networks to reversible ones."""

from .back_to_resnet import to_resnet
from .choose import Run
from .convert import convert
from .report import Fidelity, compare
from .save import save_converted
from .source import load_source
from .statistics import re_estimate

__all__ = ["Fidelity", "Run", "compare", "convert", "load_source", "re_estimate", "save_converted", "to_resnet"]
