"""The optimizers of stages: together, timm's of the whole model."""

from typing import Any

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2

from petra_zoo.errors import UserError
from petra_zoo.settings.recipe import Recipe
from petra_zoo.training import optimization
from petra_zoo.training.optimization import learning_rates, optimizer_factory

GROUPED = {"fallback_list": ["fc*"], "filter_bias_and_bn": False}


def settings_by_parameter(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> dict[str, dict[str, Any]]:
    """Of every parameter the settings of its group."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        names[id(p)]: {k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups for p in g["params"]
    }


@pytest.mark.filterwarnings("ignore:It is highly recommended to have 'opt_einsum'")
@pytest.mark.parametrize("layer_decay", [None, 0.7])
@pytest.mark.parametrize(
    ("opt", "opt_kwargs"),
    [
        ("sgd", {}),
        ("muon", {}),
        ("muon", GROUPED),
        ("nadamw", {}),
        ("adan", {}),
        ("kron", {}),
        ("adamw", {}),
        ("lion", {}),
    ],
)
def test_weight_decay_and_layer_decay_are_timms(
    opt: str, opt_kwargs: dict[str, Any], layer_decay: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimization, "find_spec", lambda name: name)
    model = timm.create_model("petra_revnet_tiny", num_classes=10)
    settings = {"opt": opt, "lr": 0.01, "weight_decay": 0.05, "momentum": 0.8, "layer_decay": layer_decay}
    whole = create_optimizer_v2(model, **settings, **opt_kwargs)
    recipe = Recipe(model="petra_revnet_tiny", dataset="shapes", opt_kwargs=opt_kwargs, **settings)
    make, named = optimizer_factory(recipe, model), list(model.named_parameters())
    found: dict[str, dict[str, Any]] = {}
    for part in (named[:10], named[10:31], named[31:]):
        found |= settings_by_parameter(make(part), model)
    assert found == settings_by_parameter(whole, model)


@pytest.mark.parametrize("opt", ["kronw", "lookahead_kron"])
def test_an_optimizer_that_needs_a_package_says_so(opt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimization, "find_spec", lambda name: None)
    recipe = Recipe(model="petra_revnet_tiny", dataset="shapes", opt=opt)
    with pytest.raises(UserError, match=f"optimizer '{opt}' needs the package opt_einsum: pip install opt_einsum"):
        optimizer_factory(recipe, torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"sched": "wsd", "epochs": 4, "warmup_epochs": 4}, "sched=wsd: warmup_epochs=4 takes all of epochs=4"),
        ({"sched": "rsqrt", "max_updates": 9, "warmup_epochs": 1}, "sched=rsqrt: warmup_epochs=1 takes all of max_u"),
        ({"sched": "wsd", "epochs": 9, "decay_epochs": 8}, "sched=wsd: decay_epochs=8 is more than epochs=9 leaves"),
    ],
)
def test_a_schedule_without_room_names_the_setting(settings: dict[str, Any], said: str) -> None:
    length = {"epochs": None} if "max_updates" in settings else {}
    recipe = Recipe(model="petra_revnet_tiny", dataset="shapes", **length, **settings)
    with pytest.raises(UserError, match=said):
        learning_rates(recipe, 10)
