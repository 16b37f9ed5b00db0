"""What is looked at before a network of somebody's own is trained."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from petra_zoo.errors import UserError
from petra_zoo.reversible import CoupledUnit, FunctionUnit, Unit
from petra_zoo.settings.recipe import Recipe
from petra_zoo.training.build import build_in_parts, build_model, check_units, open_data, preprocessing_for
from tests.training.test_train import QUICK, quick


class Own(nn.Module):
    """A network of two units; how the head's unit and the model compute is said from outside."""

    num_features = 4

    def __init__(self, num_classes: int, head: Callable[..., Any], forward: Callable[..., Tensor]) -> None:
        super().__init__()
        self.num_classes, self.pretrained_cfg = num_classes, {"architecture": "own", "input_size": (3, 8, 8)}
        self.stem, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, num_classes)
        self.of_unit, self.of_model = head, forward

    def units(self) -> list[Unit]:
        stem = FunctionUnit("stem", lambda x: (self.stem(x).mean((2, 3)),), {"stem": self.stem})
        return [stem, FunctionUnit("head", lambda x: self.of_unit(self.head(x)), {"head": self.head})]

    def forward(self, x: Tensor) -> Tensor:
        return self.of_model(self.head(self.stem(x).mean((2, 3))))


def same(x: Tensor) -> Tensor:
    return x


@pytest.mark.parametrize(
    ("head", "forward", "message"),
    [
        (lambda x: (2 * x,), same, r"units\(\) of own and the model compute different logits"),
        (same, same, r"unit head of own gives a Tensor: expected a tuple of tensors"),
        (lambda x: (x[:, :2],), lambda x: x[:, :2], r"own gives logits of shape \[1, 2\]: expected \[1, 4\]"),
    ],
    ids=["other-logits", "no-tuple", "other-classes"],
)
def test_units_that_are_not_the_model_are_refused(
    head: Callable[..., Any],
    forward: Callable[..., Tensor],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    entrypoints = timm.models._registry._model_entrypoints
    monkeypatch.setitem(entrypoints, "own", lambda num_classes, **_: Own(num_classes, head, forward))
    with pytest.raises(UserError, match=message):
        quick(tmp_path, model="own", stages=2)


def test_a_process_of_several_builds_the_large_tensors_of_its_part_later() -> None:
    recipe = Recipe(**{**QUICK, "model": "petra_revnet18_cifar"})
    data, _ = open_data(recipe)
    model, deferred = build_in_parts(recipe, data)
    assert deferred is not None
    missing = {name for name, x in model.named_parameters() if x.is_meta}
    assert "layer4.1.conv2.weight" in missing
    whole = build_model(recipe, data)
    deferred.fill(model)
    assert all(torch.equal(x, whole.get_parameter(name)) for name, x in model.named_parameters())


def test_any_chain_of_blocks_is_built_whole() -> None:
    blocks = {"source": "mixer_s32_224", "img_size": 64}
    recipe = Recipe(**{**QUICK, "model": "petra_any", "model_kwargs": blocks, "img_size": 64})
    model, deferred = build_in_parts(recipe, open_data(recipe)[0])
    assert deferred is None
    assert not any(x.is_meta for x in model.parameters())


def test_somebodys_own_network_is_built_whole_by_every_process(monkeypatch: pytest.MonkeyPatch) -> None:
    entrypoints = timm.models._registry._model_entrypoints
    wide = 2**14  # its head is a large tensor
    monkeypatch.setattr(Own, "num_features", wide)

    def make(num_classes: int, **_: Any) -> Own:
        own = Own(num_classes, lambda x: (x,), same)
        own.head = nn.Linear(wide, num_classes)
        return own

    monkeypatch.setitem(entrypoints, "own", make)
    recipe = Recipe(**{**QUICK, "model": "own"})
    model, deferred = build_in_parts(recipe, open_data(recipe)[0])
    assert deferred is None
    assert not any(x.is_meta for x in model.parameters())


def test_looking_at_units_draws_no_random_number() -> None:
    recipe = Recipe(**QUICK)
    data, _ = open_data(recipe)
    model = build_model(recipe, data).train()
    before, state = torch.get_rng_state(), {key: value.clone() for key, value in model.state_dict().items()}
    check_units(recipe, model, preprocessing_for(recipe, data, model))
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


class Spreading(Own):
    """The branch of its block has three channels, over which the addition spreads the one of its input."""

    def units(self) -> list[Unit]:
        stem, head = super().units()
        wide = nn.Conv2d(1, 3, 3, padding=1)
        block = CoupledUnit("block", wide, branch=wide, activate=nn.Identity(), coupling=lambda: 0.0, starts=True)
        return [FunctionUnit("grey", lambda x: (x[:, :1],), {}), block, stem, head]


def test_a_branch_that_changes_the_shape_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entrypoints = timm.models._registry._model_entrypoints
    monkeypatch.setitem(entrypoints, "own", lambda num_classes, **_: Spreading(num_classes, lambda x: (x,), same))
    recipe = Recipe(**{**QUICK, "model": "own"})
    data, _ = open_data(recipe)
    model = build_model(recipe, data)
    with pytest.raises(UserError, match=r"branch of unit block of own turns \[1, 1, 8, 8\] into \[1, 3, 8, 8\]"):
        check_units(recipe, model, preprocessing_for(recipe, data, model))
