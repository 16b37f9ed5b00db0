"""What an epoch feeds: no micro-batch that a norm cannot take, none that is not there."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from torch import Tensor, nn

from petra_zoo.data.loader import ImageLoader, Sharding, create_loader
from petra_zoo.data.preprocessing import Preprocessing
from petra_zoo.errors import UserError
from petra_zoo.petra import World
from petra_zoo.settings.augmentation import Augmentation
from petra_zoo.settings.recipe import Recipe
from petra_zoo.settings.recipe_files import override_recipe
from petra_zoo.training.build import (
    build_loaders,
    build_model,
    check_batches,
    check_norms,
    open_data,
    preprocessing_for,
)
from petra_zoo.training.engine import autocast_type, build_pipeline
from petra_zoo.training.optimization import learning_rates
from petra_zoo.training.progress import Reporter
from petra_zoo.training.run import train
from tests.training.test_train import QUICK, quick


def write_images(folder: Path, train: int, val: int = 2) -> dict[str, Any]:
    """A folder of 8x8 images of two classes; gives the settings that open it."""
    for split, count in (("train", train), ("val", val)):
        for i in range(count):
            path = folder / split / ("cat", "dog")[i % 2] / f"{i:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (i * 10, 0, 100)).save(path)
    return {"dataset": "folder", "data_dir": folder, "img_size": 8}


def make_loader(settings: dict[str, Any], batch_size: int, train: bool = True, shards: int = 1) -> ImageLoader:
    data = open_data(Recipe(**QUICK | settings))[0]
    preprocessing = Preprocessing((3, 8, 8), (0.5,) * 3, (0.5,) * 3)
    augmentation = Augmentation() if train else None
    return create_loader(
        data, preprocessing, batch_size=batch_size, augmentation=augmentation, sharding=Sharding(count=shards)
    )


@pytest.mark.parametrize(
    ("batch_size", "train", "shards", "batches", "left_out"),
    [
        (4, True, 1, 2, 1),
        (4, False, 1, 3, 0),
        (8, True, 1, 1, 1),
        (5, True, 1, 2, 0),
        (1, True, 1, 9, 0),
        (16, True, 1, 1, 0),
        (2, True, 2, 2, 1),
        (2, True, 3, 1, 3),
        (4, True, 2, 1, 1),
    ],
)
def test_a_last_training_batch_of_one_image_is_left_out(
    tmp_path: Path, batch_size: int, train: bool, shards: int, batches: int, left_out: int
) -> None:
    loader = make_loader(write_images(tmp_path, 9), batch_size, train, shards)
    assert (len(loader), loader.left_out) == (batches, left_out)
    sizes = [len(labels) for _, labels in loader]
    assert len(sizes) == batches
    assert batch_size == 1 or 1 not in sizes or not train


def test_a_data_set_of_one_image_still_gives_a_batch(tmp_path: Path) -> None:
    assert len(make_loader(write_images(tmp_path, 1, 1), 4)) == 1


def test_training_goes_on_without_the_last_image_and_says_so_once(tmp_path: Path) -> None:
    console = Console(record=True, width=200, file=(tmp_path / "out").open("w"))
    settings = QUICK | write_images(tmp_path / "data", 17) | {"batch_size": 8, "epochs": 2, "model_kwargs": {}}
    train(Recipe(**settings, output=tmp_path / "run"), reporter=Reporter(console))
    text = console.export_text()
    console.file.close()
    assert text.count("an epoch leaves out 1 of 17 images: a last micro-batch of one") == 1
    assert "2 epochs of 2 micro-batches" in text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 1}, "batch_size=1: batch norms see micro-batches, and 1 image is too few"),
        ({"batch_size": 7}, r"^batch_size=7: batch norms see micro-batches, and 7 images are too few for their "
         r"statistics; expected batch_size=8 or more, or group norm, model_kwargs={norm_layer: groupnorm1}, or freeze"),
        ({"update_size": 6, "accumulation_steps": 2, "batch_size": None}, r"^update_size=6: .*expected update_size=16"),
        ({"update_size": 8, "max_delay": 3, "batch_size": None}, r"^batch_size=4, by update_size=8 and max_delay=3: "
         r"batch norms see .*expected update_size=16 or stages=2 or max_delay=6, or group norm"),
        ({"batch_size": 10}, "batch_size=10 is more than the 9 training images"),
        ({"batch_size": 4, "accumulation_steps": 3}, "accumulation_steps=3 is more than the 2 micro-batches"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_what_cannot_be_fed_is_refused_in_one_line(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        quick(tmp_path, **write_images(tmp_path / "data", 9) | settings)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


GROUP_NORM = {"model_kwargs": {"norm_layer": "groupnorm1"}}


@pytest.mark.parametrize(
    "settings",
    [
        {"batch_size": 1, "freeze_bn": True},
        {"batch_size": 1, "freeze": "backbone"},
        {"batch_size": 1, **GROUP_NORM},
        {"batch_size": 4, "data_parallel": 2, "sync_bn": True},
    ],
    ids=lambda value: list(value)[1],
)
def test_small_micro_batches_are_fed_where_every_norm_can_take_them(tmp_path: Path, settings: dict[str, Any]) -> None:
    recipe = Recipe(**QUICK | write_images(tmp_path, 9) | settings)
    data, val = open_data(recipe)
    model = build_model(recipe, data)
    preprocessing = preprocessing_for(recipe, data, model)
    check_batches(recipe, build_loaders(recipe, data, val, preprocessing, World())[0])
    check_norms(recipe, model, preprocessing)


def test_the_group_norm_that_is_named_fits_the_network(tmp_path: Path) -> None:
    for settings in ({}, {"model": "petra_revnet18_cifar", "img_size": 32}):
        recipe = Recipe(**QUICK | write_images(tmp_path, 9) | {"batch_size": 1} | settings)
        data, _ = open_data(recipe)
        model = build_model(recipe, data)
        with pytest.raises(UserError) as caught:
            check_norms(recipe, model, preprocessing_for(recipe, data, model))
        named = str(caught.value).partition("model_kwargs=")[2].partition(",")[0]
        fitting = override_recipe(recipe, [f"model_kwargs={named}"])
        check_norms(fitting, build_model(fitting, data), preprocessing_for(fitting, data, model))


class OwnNorm(nn.Module):
    """Normalises by the batch, but is none of torch's batch norms."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, training=True)


def test_single_images_are_refused_where_a_norm_of_ones_own_takes_their_variance(tmp_path: Path) -> None:
    recipe = Recipe(**QUICK | write_images(tmp_path, 9) | {"batch_size": 1} | GROUP_NORM)
    data, _ = open_data(recipe)
    model = build_model(recipe, data)
    model.global_pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), OwnNorm(), nn.Flatten())
    with pytest.raises(UserError, match="batch_size=1: a norm of petra_revnet_tiny sees one value per channel"):
        check_norms(recipe, model, preprocessing_for(recipe, data, model))


def test_an_epoch_shorter_than_the_pipeline_is_deep_is_told_to_fill_it(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from petra_zoo.hub.curve import training_curve

    console = Console(record=True, width=200, file=(tmp_path / "out").open("w"))
    settings = QUICK | write_images(tmp_path / "data", 16) | {"batch_size": 8, "epochs": 3}
    train(Recipe(**settings, output=tmp_path / "run"), reporter=Reporter(console))
    lines = [line for line in console.export_text().splitlines() if line.startswith("epoch ")]
    console.file.close()
    assert ["pipeline filling" in line for line in lines] == [True, False, False]
    assert "nan" not in "".join(lines)
    with (tmp_path / "run" / "summary.csv").open() as file:
        losses = [row["train_loss"] for row in csv.DictReader(file)]
    assert losses[0] == ""
    assert all(float(loss) > 0 for loss in losses[1:])
    assert training_curve(tmp_path / "run" / "summary.csv").startswith(b"\x89PNG")


def test_the_only_epochs_loss_counts_what_is_drained(tmp_path: Path) -> None:
    result = quick(tmp_path, **write_images(tmp_path / "data", 16), batch_size=8)
    with (result.path / "summary.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert float(row["train_loss"]) > 0


def test_the_logged_learning_rate_is_the_schedules_not_a_scaled_layers(tmp_path: Path) -> None:
    recipe = Recipe(**QUICK | {"lr": 0.1, "layer_decay": 0.5, "epochs": 4, "stages": 2})
    rates, plain = (learning_rates(one, 4) for one in (recipe, recipe.model_copy(update={"layer_decay": None})))
    data, _ = open_data(recipe)
    model = build_model(recipe, data)
    pipeline = build_pipeline(recipe, model, 4, preprocessing_for(recipe, data, model))
    for updates in range(1, 16):
        for stage in pipeline.stages:
            stage.scheduler.step_update(updates)
        largest = max(group["lr"] for stage in pipeline.stages for group in stage.optimizer.param_groups)  # type: ignore[union-attr]
        assert rates(updates) == pytest.approx(largest), "the head's, which layer_decay does not scale"
        assert rates(updates) == plain(updates)
    assert rates(8) == pytest.approx(0.05)


def test_autocast_computes_in_the_type_that_the_recipe_says() -> None:
    recipe = Recipe(**QUICK | {"amp": True})
    other = recipe.model_copy(update={"amp_dtype": "float16"})
    data, _ = open_data(recipe)
    model = build_model(recipe, data)
    for one, name in ((recipe, "torch.bfloat16"), (other, "torch.float16")):
        pipeline = build_pipeline(one, model, 4, preprocessing_for(recipe, data, model))
        assert str(pipeline.settings.autocast) == str(autocast_type(one)) == name
    assert autocast_type(recipe.model_copy(update={"amp": False})) is None
