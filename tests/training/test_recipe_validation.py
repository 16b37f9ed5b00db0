"""Trying recipes out: what is generated is read as the data set itself, and what is wrong is found."""

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.utils import ModelEmaV3

from petra_zoo.data.datasets import DataError, open_dataset
from petra_zoo.data.generated_files import write_dataset
from petra_zoo.errors import UserError
from petra_zoo.settings.recipe import Recipe
from petra_zoo.settings.recipe_files import list_recipes, load_recipe
from petra_zoo.training import engine, preparation
from petra_zoo.training.progress import Reporter
from petra_zoo.training.recipe_validation import try_recipe, validate_recipes
from petra_zoo.training.run import train

DIGITS = "digits/petra_revnet_tiny"
TINY = {"model": "petra_revnet_tiny", "stages": 4, "warmup_epochs": 0, "epochs": 1}


@pytest.mark.parametrize(
    ("name", "classes", "size"), [("cifar10", 10, 32), ("cifar100", 100, 32), ("imagenet32", 1000, 32)]
)
def test_generated_arrays_are_read_as_the_data_set(tmp_path: Path, name: str, classes: int, size: int) -> None:
    assert write_dataset(name, tmp_path)
    for split in ("train", "val"):
        data = open_dataset(name, split, data_dir=tmp_path, verify=False)  # type: ignore[arg-type]
        assert (data.num_classes, data.image_size) == (classes, size)
        assert data[len(data) - 1][0].size == (size, size)


def test_a_generated_image_folder_has_imagenets_classes_and_jpegs_of_another_shape(tmp_path: Path) -> None:
    assert write_dataset("folder", tmp_path)
    train, val = (open_dataset("folder", split, data_dir=tmp_path) for split in ("train", "val"))  # type: ignore[arg-type]
    assert train.num_classes == val.num_classes == 1000
    assert train.source(0).endswith(".JPEG")
    width, height = train[0][0].size
    assert width != height


def test_data_without_files_of_a_known_format_is_left_alone(tmp_path: Path) -> None:
    assert not write_dataset("digits", tmp_path)
    assert not write_dataset("torch/image_folder", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_files_with_other_checksums_are_refused_where_they_are_verified(tmp_path: Path) -> None:
    write_dataset("cifar10", tmp_path)
    with pytest.raises(DataError, match="no complete cifar10"):
        open_dataset("cifar10", "train", data_dir=tmp_path)


@pytest.mark.parametrize("dataset", ["cifar10", "imagenet32"])
def test_a_recipe_is_tried_on_generated_files_not_on_its_own_data(dataset: str, tmp_path: Path) -> None:
    try_recipe(Recipe(**TINY, dataset=dataset, data_dir=tmp_path / "nowhere", dataset_download=True, pretrained=True))


@pytest.mark.parametrize("method", ["petra", "reversible", "backprop"])
def test_two_updates_are_made_at_the_recipes_learning_rate(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    pipelines = []

    def record(recipe: Recipe, *args: Any) -> Any:
        pipelines.append((recipe, engine.build_pipeline(recipe, *args)))
        return pipelines[-1][1]

    monkeypatch.setattr(preparation, "build_pipeline", record)
    recipe = load_recipe(DIGITS, [f"method={method}", "batch_size=32", "accumulation_steps=3", "opt=adamw"])
    try_recipe(recipe)
    ((tried, pipeline),) = pipelines
    assert (pipeline.fed, pipeline.in_flight) == (4, 0)  # of two micro-batches each, which is enough to try
    steps = {int(s["step"]) for stage in pipeline.stages for s in stage.optimizer.state_dict()["state"].values()}
    assert steps == {2}
    assert (tried.batch_size, tried.learning_rate) == (2, recipe.learning_rate)


def test_every_recipe_that_matches_gets_a_verdict() -> None:
    names = [verdict.recipe for verdict in validate_recipes("*/petra_revnet_tiny", ["epochs=0"])]
    assert names == [name for name in list_recipes() if name.endswith("/petra_revnet_tiny")]


def test_a_file_is_tried_by_its_path(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text("model: petra_revnet_tiny\ndataset: cifar10\nstages: 15\n")
    (verdict,) = validate_recipes(str(path))
    assert verdict.reason == "stages=15 does not fit a model of 14 units: choose 1 to 14"


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["model=petra_revnet_tinny"], "model 'petra_revnet_tinny' is unknown; nearest: petra_revnet_tiny"),
        (["optt=sgd"], "unknown setting 'optt'; did you mean 'opt'?"),
        (["opt=sgd", "opt_kwargs={x: 1}"], "optimizer 'sgd'"),
        (["dataset=torch/nothing"], "timm cannot open data set 'torch/nothing'"),
        (["lr=1e30"], "the loss of stage 3 is nan"),
        (["lr=1e-60", "warmup_epochs=0"], "no parameter of stage 0 changed in 2 updates"),
    ],
)
def test_what_is_wrong_with_a_recipe_is_the_reason(overrides: list[str], reason: str) -> None:
    (verdict,) = validate_recipes(DIGITS, overrides)
    assert not verdict.ok
    assert reason in str(verdict.reason)
    assert "\n" not in str(verdict.reason)


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["batch_size=2000"], "batch_size=2000 is more than the 1437 training images"),
        (["batch_size=32", "accumulation_steps=50"], "=50 is more than the 45 micro-batches of an epoch"),
        (["batch_size=4", "stages=1"], "batch_size=4: batch norms see micro-batches, and 4 images are too few"),
        (["batch_size=4", "freeze_bn=true", "lr=1e-3"], None),
        (["update_size=64", "max_delay=1"], None),
        (["update_size=48", "max_delay=0.5"], "expected update_size=96 or stages=2 or max_delay=1, or group norm"),
        (["loss=cross_entropi"], "unknown loss 'cross_entropi'; did you mean cross_entropy?"),
        (["profile=/nowhere/profile.json"], "cannot read the profile /nowhere/profile.json"),
        (["coupling_epochs=3", "model_kwargs={coupling: 0.5}"], "the network is built with coupling=0.5"),
        (["coupling_epochs=3", "model=petra_revnet18_paper_cifar", "img_size=32"], "has no coupling to move"),
        (["coupling_epochs=3", "model_kwargs={layers: [2, 2, 2, 2]}"], None),
        (["model_ema=true"], None),
        (["loss=bce", "smoothing=0.1"], None),
    ],
)
def test_what_only_a_run_would_find_is_found(overrides: list[str], reason: str | None) -> None:
    (verdict,) = validate_recipes(DIGITS, overrides)
    assert (verdict.reason is None) if reason is None else (reason in str(verdict.reason)), verdict.reason


def test_the_moving_average_is_what_is_evaluated(monkeypatch: pytest.MonkeyPatch) -> None:
    class Spoiled(ModelEmaV3):
        def update(self, model: torch.nn.Module, step: int | None = None) -> None:
            super().update(model, step)
            self.module.fc.bias.data.fill_(float("nan"))

    monkeypatch.setattr(preparation, "ModelEmaV3", Spoiled)
    assert all(verdict.ok for verdict in validate_recipes(DIGITS))
    (verdict,) = validate_recipes(DIGITS, ["model_ema=true"])
    assert verdict.reason == "evaluation gave [2, 10] logits that are wrong in number, or not finite"


@pytest.mark.parametrize(
    ("overrides", "processes", "reason"),
    [
        (["device_speed=[1, 2]"], None, None),
        (["device_speed=[1, 2, 1, 1, 1]"], None, "5 processes for 4 stages: launch 1 to 4"),
        (["device_speed=[1, 2]"], 3, "device_speed=[1.0, 2.0] must give one speed for each of 3 processes"),
        ([], 4, None),
        ([], 5, "5 processes for 4 stages: launch 1 to 4"),
        (["data_parallel=2"], 8, None),
        (["data_parallel=2"], 3, "data_parallel=2 does not divide 3 processes"),
        (["data_parallel=2", "batch_size=1500"], None, "batch_size=1500 for each of 2 replicas is more than"),
        (["data_parallel=2", "sync_bn=true", "device=cpu"], None, "torch synchronises batch norms on CUDA only"),
        (["wire_up=bfloat16", "wire_down=bfloat16"], 2, None),
    ],
)
def test_what_only_several_processes_would_find_is_found(
    overrides: list[str], processes: int | None, reason: str | None
) -> None:
    (verdict,) = validate_recipes(DIGITS, overrides, processes)
    assert (verdict.reason is None) if reason is None else (reason in str(verdict.reason)), verdict.reason


def no_network(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("nothing is downloaded to try a recipe")


@pytest.mark.parametrize(
    ("teacher", "reason"),
    [
        ("resnet18.a1_in1k", "the teacher resnet18.a1_in1k does not know class '0' of data set digits"),
        ("resnet19", "model 'resnet19' is unknown; nearest: "),
        ("resnet18.nothing", "Invalid pretrained tag (nothing) for resnet18"),
        ("petra_revnet18_cifar", "timm has no trained weights of it"),
        ("runs/nothing", "there is no run directory 'runs/nothing'"),
        ("hf-hub:nobody/nothing", "kd_model_name=hf-hub:nobody/nothing: this machine has never had it"),
        ("petra_revnet_tiny.digits", None),
    ],
)
def test_a_teacher_is_tried_without_a_download(
    monkeypatch: pytest.MonkeyPatch, teacher: str, reason: str | None
) -> None:
    monkeypatch.setattr(socket.socket, "connect", no_network)
    (verdict,) = validate_recipes(DIGITS, [f"kd_model_name={teacher}"])
    assert (verdict.reason is None) if reason is None else (reason in str(verdict.reason)), verdict.reason
    assert "\n" not in str(verdict.reason)


def test_a_teacher_that_lies_here_gives_the_number_of_classes_of_made_up_images(tmp_path: Path) -> None:
    run = train(
        Recipe(**TINY, workers=0, dataset="synthetic:7x8", output=tmp_path / "run"), reporter=Reporter(quiet=True)
    ).path
    settings = {**TINY, "dataset": "folder", "img_size": 16, "kd_model_name": str(run), "coupling_epochs": 1}
    try_recipe(Recipe(**settings))
    with pytest.raises(UserError, match="the teacher tells 7 classes apart, the network 3"):
        try_recipe(Recipe(**settings, num_classes=3))


def test_a_teacher_from_the_hub_is_tried_as_its_config_in_the_cache_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train(
        Recipe(**TINY, workers=0, dataset="synthetic:10x8", output=tmp_path / "run"), reporter=Reporter(quiet=True)
    ).path
    (run / "model.safetensors").unlink()  # the weights are not looked at
    monkeypatch.setattr("petra_zoo.training.teachers.try_to_load_from_cache", lambda *_, **__: str(run / "config.json"))
    monkeypatch.setattr(socket.socket, "connect", no_network)
    (verdict,) = validate_recipes(DIGITS, ["kd_model_name=hf-hub:me/mine"])
    assert verdict.ok, verdict.reason


def test_a_bug_is_a_reason_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("several\nlines")

    monkeypatch.setattr(preparation, "build_model", broken)
    (verdict,) = validate_recipes(DIGITS)
    assert verdict.reason == "RuntimeError: several lines"


def test_a_pattern_without_a_recipe_is_a_user_error() -> None:
    with pytest.raises(UserError, match="no recipe matches 'cifra/"):
        validate_recipes("cifra/*")


def test_trying_changes_nothing_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    try_recipe(Recipe(**TINY, dataset="cifar10"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("name", "method"),
    [
        *((name, "petra") for name in list_recipes()),
        *(("cifar10/petra_revnet18_cifar", method) for method in ("backprop", "reversible", "local")),
    ],
)
def test_all_recipes_are_valid_and_one_under_every_control(name: str, method: str) -> None:
    (verdict,) = validate_recipes(name, [f"method={method}", "device=cpu"])
    assert verdict.ok, verdict.reason
