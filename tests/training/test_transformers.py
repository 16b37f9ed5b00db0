"""Transformers in recipes: trained under PETRA, saved, evaluated, fine-tuned, planned."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from petra_zoo.errors import UserError
from petra_zoo.evaluation.checkpoint_evaluation import evaluate_checkpoint
from petra_zoo.models.transformer_weights import couple_as_loaded
from petra_zoo.petra import Profile
from petra_zoo.petra.counting import input_size_of
from petra_zoo.planning.profiles import profile_of
from petra_zoo.settings.recipe import Recipe
from petra_zoo.training.build import build_model, open_data
from petra_zoo.training.coupling_schedule import CouplingSchedule
from petra_zoo.training.progress import Reporter
from petra_zoo.training.run import Result, train
from tests.models.transformers import source, transformer

SMALL = {"patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 2}
QUICK = {
    "model": "petra_vit_tiny_patch16_224",
    "dataset": "synthetic:4x8x128",
    "batch_size": 32,
    "workers": 0,
    "epochs": 1,
    "lr": 0.05,
    "warmup_epochs": 0,
    "stages": 3,
    "hflip": 0.0,
    "train_crop_mode": "pad",
}


def quick(tmp_path: Path, **settings: Any) -> Result:
    settings = {**QUICK, "model_kwargs": SMALL, "output": tmp_path / "run", **settings}
    return train(Recipe(**settings), name="quick", reporter=Reporter(quiet=True))


def test_a_transformer_trained_in_stages_is_what_timm_loads(tmp_path: Path) -> None:
    result = quick(tmp_path)
    config = json.loads((result.path / "config.json").read_text())
    assert config["architecture"] == "petra_vit_tiny_patch16_224"
    assert config["pretrained_cfg"]["input_size"] == [3, 8, 8]
    model = timm.create_model(f"local-dir:{result.path}", pretrained=True)
    assert (model.blocks.g(), len(model.blocks), model.patch_embed.grid_size) == (1.0, 4, (2, 2))
    again = evaluate_checkpoint(str(result.path), "synthetic:4x8x128")
    assert again.evaluation.loss == pytest.approx(result.evaluation.loss, rel=1e-5)


def test_the_network_takes_the_images_size() -> None:
    recipe = Recipe(**{**QUICK, "model_kwargs": SMALL, "img_size": 16})
    model = build_model(recipe, open_data(recipe)[0])
    assert model(torch.randn(1, 3, 16, 16)).shape == (1, 4)
    assert input_size_of(model) == (3, 16, 16)


def test_images_that_are_no_multiple_of_the_patches_are_refused() -> None:
    recipe = Recipe(**{**QUICK, "model_kwargs": SMALL, "img_size": 10})
    with pytest.raises(UserError, match=r"images of 10x10 are no multiple of .*'s patches of 4x4"):
        build_model(recipe, open_data(recipe)[0])


def test_a_profile_is_measured_at_the_size_asked_for() -> None:
    profile: Profile = profile_of("petra_test_vit", batch_size=2, input_size=(3, 32, 32), device="cpu")
    assert len(profile.units) == 8
    assert tuple(profile.input_size) == (3, 32, 32)


def test_a_moved_coupling_takes_its_gain_along() -> None:
    model = transformer()
    model.load_state_dict(source().state_dict())
    couple_as_loaded(model)
    schedule = CouplingSchedule(model, 2)
    seen = []
    for epoch in range(3):
        schedule.apply(epoch, model)
        seen.append((model.blocks.g(), model.blocks.gain_now()))
    assert seen == [(0.25, 1.25), (0.625, 1.625), (1.0, 2.0)]
