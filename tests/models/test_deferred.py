"""Networks that are built without their large tensors and filled later are those that are built at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from timm.models import save_for_hf
from torch import nn

from petra_zoo.models.deferred import Deferred

SMALL = 1000  # elements: small test networks have few larger tensors
FAMILIES = {
    "petra_revnet_tiny": {},
    "petra_revnet18_cifar": {},
    "petra_revvit_micro": {"drop_path_rate": 0.1},
    "petra_vit_tiny_patch16_224": {"depth": 3},
    "petra_eva02_tiny_patch14_224": {"depth": 3},
    "petra_beit_base_patch16_224": {"depth": 2},
}


def both(create: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module, Deferred]:
    """A network built at once and the same one built without its large tensors; the generators end alike."""
    torch.manual_seed(3)
    at_once = create()
    after = torch.get_rng_state()
    torch.manual_seed(3)
    with Deferred.building(SMALL) as deferred:
        later = create()
    assert torch.equal(torch.get_rng_state(), after)
    return at_once, later, deferred


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def assert_same(one: nn.Module, other: nn.Module) -> None:
    ours, theirs = tensors(one), tensors(other)
    assert list(ours) == list(theirs)
    assert all(torch.equal(x, theirs[name]) for name, x in ours.items())


@pytest.mark.parametrize(("name", "arguments"), FAMILIES.items())
def test_every_family_is_the_same_to_the_bit(name: str, arguments: dict[str, float]) -> None:
    at_once, later, deferred = both(lambda: timm.create_model(name, **arguments))
    assert sum(x.is_meta for x in later.parameters()) > 5
    deferred.fill(later)
    assert_same(at_once, later)


@pytest.mark.parametrize("arguments", [{}, {"num_classes": 7}, {"in_chans": 1}, {"img_size": 96}])
def test_pretrained_weights_are_read_when_they_are_filled(tmp_path: Path, arguments: dict[str, int]) -> None:
    name, file = "petra_vit_tiny_patch16_224", tmp_path / "model.safetensors"
    save_for_hf(timm.create_model(name, depth=2), tmp_path, model_args={"depth": 2}, safe_serialization=True)
    at_once, later, deferred = both(lambda: timm.create_model(f"local-dir:{tmp_path}", pretrained=True, **arguments))
    moved = file.rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError):
        deferred.fill(later)
    moved.rename(file)
    deferred.fill(later)
    assert_same(at_once, later)


def test_only_what_is_wanted_is_filled() -> None:
    model: nn.Module
    _, model, deferred = both(lambda: nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)))
    deferred.fill(model, leave=[model.get_submodule("1")])
    assert [x.is_meta for x in (model.get_parameter("0.weight"), model.get_parameter("1.weight"))] == [False, True]


def test_who_holds_a_parameter_has_it_filled() -> None:
    def tied() -> nn.Module:
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
        model.get_submodule("1").register_parameter("weight", model.get_parameter("0.weight"))
        return model

    at_once, later, deferred = both(tied)
    held = next(later.parameters())
    held.decay = 0.5  # type: ignore[attr-defined]
    deferred.fill(later)
    assert_same(at_once, later)
    assert later.get_parameter("1.weight") is later.get_parameter("0.weight") is held
    assert held.decay == 0.5  # type: ignore[attr-defined]


def test_what_needs_values_gets_them() -> None:
    """Reading a large tensor, and writing a small one computed of it, happens at once."""

    def scaled() -> nn.Module:
        model = nn.Linear(64, 64)
        model.register_buffer("largest", torch.zeros(()))
        with torch.no_grad():
            model.get_buffer("largest").copy_(model.weight.abs().max())
            model.weight.div_(float(model.weight.norm()))
        return model

    at_once, later, deferred = both(scaled)
    assert torch.equal(later.get_buffer("largest"), at_once.get_buffer("largest"))
    deferred.fill(later)
    assert_same(at_once, later)


@pytest.mark.parametrize("elements", [8, 4096])
def test_a_source_that_is_changed_afterwards_is_never_taken_for_what_it_was(elements: int) -> None:
    """A small one is copied; a large one, for want of memory, is not."""
    source = torch.ones(elements)
    with Deferred.building(SMALL) as deferred:
        model = nn.Linear(64, 64)
        with torch.no_grad():
            model.weight.view(-1, elements).copy_(source)
        source.add_(1)
    if elements > SMALL:
        with pytest.raises(AssertionError):
            deferred.fill(model)
        return
    deferred.fill(model)
    assert torch.equal(model.weight, torch.ones(64, 64))
