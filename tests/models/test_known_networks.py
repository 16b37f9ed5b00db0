"""The table of what is known of networks without building them."""

import json
from importlib import resources

import pytest
import timm
import torch

import petra_zoo  # noqa: F401 - registers the models
from petra_zoo.models import known_networks
from petra_zoo.models.describe import describe_registered, zoo_names
from petra_zoo.models.known_networks import BYTES, TABLE, describe_and_count, describe_known, describe_with_memory

FEW = ("petra_revnet18", "petra_test_vit2", "petra_revvit_micro", "petra_eva02_tiny_patch14_224")
MORE = ("petra_revnet50_paper", "petra_vit_base_patch16_siglip_224", "petra_vit_small_r26_s32_224", "petra_revvit_base")
MORE += ("petra_deit3_small_patch16_224", "petra_beitv2_base_patch16_224", "petra_vit_small_plus_patch16_dinov3")

table = json.loads(resources.files("petra_zoo.models").joinpath(TABLE).read_text())
of_this_timm = pytest.mark.skipif(table["timm"] != timm.__version__, reason="the table is of another version of timm")


@of_this_timm
def test_the_table_has_every_network_of_the_zoo() -> None:
    """python -m petra_zoo.models.known_networks brings it up to date."""
    assert set(table["networks"]) == set(zoo_names())


@of_this_timm
@pytest.mark.parametrize("name", [*FEW, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
def test_the_table_says_what_the_networks_say(name: str) -> None:
    assert name in table["networks"]
    assert describe_known(name) == describe_registered(name)


@of_this_timm
@pytest.mark.skipif(table["torch"] != torch.__version__.partition("+")[0], reason="its bytes are of another torch")
@pytest.mark.parametrize("name", [*FEW, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
def test_the_tables_bytes_are_those_that_a_step_takes(name: str) -> None:
    assert describe_with_memory(name) == describe_and_count(name)
    assert BYTES in table["networks"][name]


def test_bytes_of_another_torch_are_counted_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.0.0")
    known_networks._table.cache_clear()
    assert all(memory is None for _, memory in known_networks._table().values())
    assert describe_with_memory("petra_revvit_micro")[1].plain > 0
    known_networks._table.cache_clear()


def test_a_network_of_another_ones_is_built() -> None:
    assert describe_known("petra_revnet_tiny.digits").parameters == describe_known("petra_revnet_tiny").parameters
