"""Which networks of timm's registry convert: all ResNets of plain blocks; others are refused by name."""

import pytest
import timm
from timm.models.resnet import BasicBlock, Bottleneck, ResNet

from petra_zoo.converters.families import family_for
from petra_zoo.converters.resnet_identity import take_identity
from petra_zoo.errors import UserError
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
            with pytest.raises(UserError, match=f"{name} cannot be converted"):
                family_for(network)
            continue
        family_for(network)
        model = PetraRevNet.from_resnet(network)
        take_identity(model, {})
        assert model.pretrained_cfg["architecture"].startswith("petra_revnet") == (name not in PRUNED), name
        found.append(name)
    assert len(found) >= CONVERTIBLE_IN_1_0_31, f"timm {timm.__version__}: {len(found)} convert: {', '.join(found)}"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("res2net50_26w_4s", "its blocks are Bottle2neck"),
        ("resnest14d", "its blocks are ResNestBottleneck"),
        ("skresnet18", "its blocks are SelectiveKernelBasic"),
        ("resnetv2_18", "it is a ResNetV2"),
        ("convnext_atto", "it is a ConvNeXt"),
        ("regnety_002", "it is a RegNet"),
        ("resnet61q", "it is a ByobNet"),
        ("legacy_seresnet18", "it is a SENet"),
    ],
)
def test_other_residual_networks_are_refused_with_what_to_use_instead(name: str, kind: str) -> None:
    with pytest.raises(UserError, match=rf"^{name} cannot be converted, {kind}: use a ResNet .*, such as resnet50"):
        family_for(timm.create_model(name, device="meta"))
