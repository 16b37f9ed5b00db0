"""Installed as petra_zoo.converters: from trained networks to reversible ones."""

from petra_zoo.converters.back_to_resnet import to_resnet
from petra_zoo.converters.chain_family import ChainFamily
from petra_zoo.converters.conversion import convert
from petra_zoo.converters.families import NetworkFamily, register_family
from petra_zoo.converters.fidelity import Fidelity, measure_fidelity
from petra_zoo.converters.reconstruction import CoupledRun
from petra_zoo.converters.reestimation import re_estimate
from petra_zoo.converters.resnet_family import ResNetFamily
from petra_zoo.converters.runs import BlockRun
from petra_zoo.converters.save import save_converted
from petra_zoo.converters.source import load_source
from petra_zoo.converters.transformer_family import TransformerFamily

__all__ = [
    "BlockRun",
    "CoupledRun",
    "Fidelity",
    "NetworkFamily",
    "convert",
    "load_source",
    "measure_fidelity",
    "re_estimate",
    "register_family",
    "save_converted",
    "to_resnet",
]

register_family(ChainFamily())
register_family(TransformerFamily())
register_family(ResNetFamily())
