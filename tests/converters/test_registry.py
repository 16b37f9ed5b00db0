"""Which networks of timm's registry convert: all ResNets of plain blocks, and every other one is refused by name."""

import pytest
import timm
import torch
from petra_zoo.converters.checks import check_blocks
from petra_zoo.converters.identity import take_identity
from timm.models.resnet import BasicBlock, Bottleneck, ResNet

from petra_zoo.errors import UserError
from petra_zoo.models import PetraRevNet

CONVERTIBLE_IN_1_0_31 = 81
PRUNED = {"ecaresnet50d_pruned", "ecaresnet101d_pruned"}
# Families of residual networks that somebody will try, besides the module `resnet` itself.
OTHERS = ["res2net50_26w_4s", "resnest14d", "skresnet18", "resnetv2_50", "convnext_atto", "regnety_002", "xresnet"]


def test_all_resnets_of_plain_blocks_convert_and_every_other_network_is_refused_by_name() -> None:
    converted = []
    for name in [*timm.list_models(module="resnet"), *timm.list_models("res*"), *timm.list_models("*seresne*")]:
        network = timm.create_model(name, device="meta")
        plain = type(network) is ResNet and {
            type(block) for i in range(1, 5) for block in getattr(network, f"layer{i}")
        } <= {BasicBlock, Bottleneck}
        if not plain:
            with pytest.raises(UserError, match=rf"{name} cannot be converted, (it is|its blocks are) .*resnet50"):
                check_blocks(network)
            continue
        model = PetraRevNet.from_resnet(network)
        take_identity(model, {})
        assert name in PRUNED or model.pretrained_cfg["architecture"].startswith("petra_revnet"), name
        converted.append(name)
    found = sorted(set(converted))
    assert len(found) >= CONVERTIBLE_IN_1_0_31, f"timm {timm.__version__} has {len(found)} that convert: {found}"
    assert set(timm.list_models(module="resnet")) >= set(found)
