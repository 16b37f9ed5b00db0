"""Which networks of timm's registry are converted by which family, and all ResNets of plain blocks by theirs."""

import pytest
import timm
import torch
from timm.models.resnet import BasicBlock, Bottleneck, ResNet

from petra_zoo.converters.chain_family import ChainFamily
from petra_zoo.converters.families import FAMILIES, NetworkFamily, family_for, register_family
from petra_zoo.converters.resnet_family import ResNetFamily
from petra_zoo.converters.resnet_identity import take_identity
from petra_zoo.converters.transformer_family import TransformerFamily
from petra_zoo.models import PetraRevNet

CONVERTIBLE_IN_1_0_31 = 81
PRUNED = {"ecaresnet50d_pruned", "ecaresnet101d_pruned"}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_every_resnet_of_plain_blocks_converts_and_all_but_the_pruned_can_be_saved() -> None:
    found = []
    for name in timm.list_models(module="resnet"):
        network = timm.create_model(name, device="meta")
        blocks = {type(block) for i in range(1, 5) for block in getattr(network, f"layer{i}")}
        if type(network) is not ResNet or not blocks <= {BasicBlock, Bottleneck}:
            assert ResNetFamily().refusal(network, torch.zeros(0)) is not None
            continue
        assert type(family_for(network)) is ResNetFamily
        model = PetraRevNet.from_resnet(network)
        take_identity(model, {})
        assert model.pretrained_cfg["architecture"].startswith("petra_revnet") == (name not in PRUNED), name
        found.append(name)
    assert len(found) >= CONVERTIBLE_IN_1_0_31, f"timm {timm.__version__}: {len(found)} convert: {', '.join(found)}"


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("resnet18", ResNetFamily),
        pytest.param("res2net50_26w_4s", ChainFamily, marks=pytest.mark.slow),
        pytest.param("resnetv2_50", ChainFamily, marks=pytest.mark.slow),
        ("test_convnext", ChainFamily),
        ("regnety_002", ChainFamily),
        ("test_vit2", TransformerFamily),
        ("eva02_tiny_patch14_224", TransformerFamily),
    ],
)
def test_a_network_is_converted_by_the_family_that_knows_it_best(name: str, family: type[NetworkFamily]) -> None:
    assert type(family_for(timm.create_model(name, device="meta"))) is family


def test_a_family_can_be_plugged_in() -> None:
    class Mine(ResNetFamily):
        name = "mine"

    with FAMILIES.restored():
        mine = register_family(Mine())
        assert family_for(timm.create_model("resnet18", device="meta")) is mine
    assert type(family_for(timm.create_model("resnet18", device="meta"))) is ResNetFamily
