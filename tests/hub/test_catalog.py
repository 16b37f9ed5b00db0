"""What list and info tell about networks and their pretrained weights."""

import json
from pathlib import Path

import pytest
import timm
from timm.models import save_for_hf

from petra_zoo.errors import UserError
from petra_zoo.hub.catalog import look_up, pretrained_tags, reference_accuracy
from tests.cli.test_main import petra_zoo
from tests.models.transformers import transformer


def test_every_tag_has_a_place_a_licence_and_a_size() -> None:
    tags = pretrained_tags()
    assert {tag.name for tag in tags} == set(timm.list_pretrained("petra_*"))
    assert all(tag.weights and tag.input_size[0] == 3 for tag in tags)
    unlicensed = [tag.name for tag in tags if not tag.license]  # timm states none
    assert unlicensed == ["petra_revnet50.bamboo", "petra_vit_base_patch16_224.bamboo"]


def test_torchvisions_figure_is_marked_as_its_own() -> None:
    found = reference_accuracy("petra_revnet18.tv_in1k")
    assert found is not None
    assert (found.dataset, found.top1, found.measured_here) == ("imagenet-1k", 69.758, False)
    assert "published by torchvision" in found.source


def test_an_accuracy_that_nobody_here_knows_is_not_told() -> None:
    assert reference_accuracy("petra_revnet18.a1_in1k") is None
    assert "accuracy not measured" in petra_zoo("info", "petra_revnet18.a1_in1k").stdout


def test_info_of_a_saved_transformer_tells_what_was_saved(tmp_path: Path) -> None:
    model = transformer("vit", depth=2, coupling=0.5, units="branch")
    save_for_hf(model, str(tmp_path / "out"), safe_serialization=True, data_config={"input_size": (3, 16, 16)})
    name = str(tmp_path / "out")
    found = look_up(name)
    assert (found.network.name, found.network.coupling, found.network.runs) == (name, [0.5], [4])
    assert found.memory.reversible < found.memory.plain
    assert found.tags == []


def test_info_of_a_tag_tells_what_loading_it_makes_of_the_network() -> None:
    untrained, tagged = look_up("petra_revnet50").network, look_up("petra_revnet50.tv2_in1k").network
    assert untrained.coupling == [1.0] * 4
    assert tagged.coupling == [0.125] * 2  # of the runs long enough to be coupled
    assert tagged.input_size == (3, 176, 176)


def test_list_pretrained_gives_one_name_a_line_in_a_pipe() -> None:
    names = petra_zoo("list", "petra_revnet18*", "--pretrained").stdout.split()
    assert names == timm.list_pretrained("petra_revnet18.*")
    assert petra_zoo("list", "revnet18", "--pretrained").stdout.split() == names


def test_list_pretrained_as_json() -> None:
    (row,) = json.loads(petra_zoo("list", "petra_revnet18.tv_in1k", "--pretrained", "--json").stdout)
    assert row["license"] == "bsd-3-clause"
    assert row["weights"] == "timm/resnet18.tv_in1k"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("petra_revnet18.nothing", "petra_revnet18 has no tag 'nothing'; it has: a1_in1k"),
        ("resnet18", r"ResNet has no units\(\): petra-zoo convert"),
    ],
)
def test_a_name_that_is_not_there(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        look_up(name)


def test_no_tag_matches() -> None:
    with pytest.raises(UserError, match="no pretrained weights match"):
        pretrained_tags("nothing*")
