"""Training by a recipe, from data to a run directory that timm loads."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from rich.console import Console

from petra_zoo.checkpoints.load import load_model
from petra_zoo.errors import UserError
from petra_zoo.evaluation.checkpoint_evaluation import evaluate_checkpoint
from petra_zoo.petra import METHODS
from petra_zoo.settings.recipe import Recipe
from petra_zoo.settings.recipe_files import load_recipe
from petra_zoo.training import run_directory
from petra_zoo.training.build import build_model, open_data, preprocessing_for
from petra_zoo.training.engine import build_pipeline
from petra_zoo.training.preparation import prepare
from petra_zoo.training.progress import Reporter
from petra_zoo.training.run import Result, train

BASE = {"model": "petra_revnet_tiny", "dataset": "synthetic:4x8x128", "batch_size": 32, "workers": 0, "epochs": 1}
QUICK = {**BASE, "lr": 0.05, "warmup_epochs": 0, "stages": 4, "hflip": 0.0, "train_crop_mode": "pad"}


def quick(tmp_path: Path, **settings: Any) -> Result:
    recipe = Recipe(**{**QUICK, "output": tmp_path / "run", **settings})
    return train(recipe, name="quick", reporter=Reporter(quiet=True))


def weights(result: Result) -> dict[str, torch.Tensor]:
    return load_model(str(result.path), torch.device("cpu")).state_dict()


def test_a_run_directory_holds_recipe_summary_metrics_and_model(tmp_path: Path) -> None:
    result = quick(tmp_path, epochs=2, log_interval=2)
    assert {path.name for path in result.path.iterdir()} == {
        "recipe.yaml",
        "environment.json",
        "evaluation.json",
        "summary.csv",
        "metrics.jsonl",
        "model.safetensors",
        "config.json",
        "checkpoints",
    }
    with (result.path / "summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert list(rows[0]) == ["epoch", "train_loss", "eval_loss", "eval_top1", "eval_top5", "lr"]
    events = [json.loads(line) for line in (result.path / "metrics.jsonl").read_text().splitlines()]
    assert {event["event"] for event in events} == {"train", "validation"}
    assert load_recipe(str(result.path / "recipe.yaml")).epochs == 2
    assert json.loads((result.path / "evaluation.json").read_text())["delay"] == result.delay == 6.0


def test_timm_loads_the_run_with_the_same_logits(tmp_path: Path) -> None:
    result = quick(tmp_path)
    model = timm.create_model(f"local-dir:{result.path}", pretrained=True).eval()
    config = json.loads((result.path / "config.json").read_text())
    assert config["architecture"] == "petra_revnet_tiny"
    assert config["pretrained_cfg"]["input_size"] == [3, 8, 8]
    assert config["pretrained_cfg"]["tag"] is None, "not the tag of the weights that the architecture comes with"
    assert len(config["label_names"]) == 4
    again = evaluate_checkpoint(str(result.path), "synthetic:4x8x128")
    assert again.evaluation.loss == pytest.approx(result.evaluation.loss, rel=1e-5)
    assert again.evaluation.top1 == result.evaluation.top1
    assert model.layer1.g() == 1.0


def test_a_recipes_normalisation_replaces_the_datas_and_travels_with_the_model(tmp_path: Path) -> None:
    result = quick(tmp_path, mean=[0.1, 0.2, 0.3], std=[1, 2, 3])
    config = json.loads((result.path / "config.json").read_text())["pretrained_cfg"]
    assert (config["mean"], config["std"]) == ([0.1, 0.2, 0.3], [1, 2, 3])
    again = evaluate_checkpoint(str(result.path), "synthetic:4x8x128")
    assert again.evaluation.loss == pytest.approx(result.evaluation.loss, rel=1e-5)


def test_the_same_recipe_gives_the_same_bits(tmp_path: Path) -> None:
    first = weights(quick(tmp_path / "a", drop_path=0.2))
    second = weights(quick(tmp_path / "b", drop_path=0.2))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_another_seed_gives_another_model(tmp_path: Path) -> None:
    first, second = weights(quick(tmp_path / "a")), weights(quick(tmp_path / "b", seed=1))
    assert not torch.equal(first["layer1.0.conv1.weight"], second["layer1.0.conv1.weight"])


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains(tmp_path: Path, method: str) -> None:
    result = quick(tmp_path, method=method, accumulation_steps=2)
    assert result.evaluation.images > 0
    assert all(torch.isfinite(value).all() for value in weights(result).values())


@pytest.mark.parametrize(
    "settings",
    [
        {"model_ema": True, "model_ema_decay": 0.5},
        {"mixup": 0.2, "smoothing": 0.1},
        {"amp": True, "channels_last": True},
        {"amp": True, "amp_dtype": "float16"},
        {"opt": "adamw", "layer_decay": 0.8, "clip_grad": 1.0, "sched": "step", "decay_epochs": 1},
        {"split": [4, 4, 3, 3], "last_stage": "recompute"},
        {"sched": "none", "drop": 0.1, "model_kwargs": {"coupling": 0.5}},
        {"in_chans": 1},
        {"val_interval": 5, "epochs": 2},
        {"weight_prediction": "head"},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_settings_reach_the_run(tmp_path: Path, settings: dict[str, Any]) -> None:
    result = quick(tmp_path, **settings)
    assert result.evaluation.images > 0
    assert all(torch.isfinite(value).all() for value in weights(result).values())


def test_weight_decay_spares_norms_and_biases_in_every_stage(tmp_path: Path) -> None:
    recipe = Recipe(**QUICK, weight_decay=0.1, opt="adamw")
    data, _ = open_data(recipe)
    model = build_model(recipe, data)
    pipeline = build_pipeline(recipe, model, 10, preprocessing_for(recipe, data, model))
    names = {id(p): name for name, p in model.named_parameters()}
    seen = {}
    for stage in pipeline.stages:
        for group in stage.optimizer.param_groups:  # type: ignore[union-attr]
            seen |= {names[id(p)]: group["weight_decay"] for p in group["params"]}
    assert seen == {name: 0.1 if p.ndim > 1 else 0.0 for name, p in model.named_parameters()}


@pytest.mark.slow  # the demo of `make test` trains by the same recipe
def test_petra_learns_digits(tmp_path: Path) -> None:
    """A short version of the demo: far above chance, through a pipeline of four stages."""
    recipe = load_recipe("digits/petra_revnet_tiny", ["epochs=5", "seed=1", f"output={tmp_path / 'run'}"])
    assert recipe.stages == 4
    assert recipe.method == "petra"
    assert train(recipe, reporter=Reporter(quiet=True)).evaluation.top1 > 70.0


def test_plain_lines_tell_loss_accuracy_speed_and_time_left(tmp_path: Path) -> None:
    console = Console(record=True, width=200, force_terminal=False, file=(tmp_path / "out").open("w"))
    train(Recipe(**QUICK, log_interval=1, output=tmp_path / "run"), name="quick", reporter=Reporter(console))
    text = console.export_text()
    console.file.close()
    assert "petra: 4 stages of" in text
    assert "img/s" in text
    assert "s left" in text
    assert "val top-1" in text


@pytest.mark.parametrize(
    ("settings", "said", "warned"),
    [
        ({"accumulation_steps": 4}, "32 images x 4 per update: D_0 = 1.5 updates", None),
        ({"method": "backprop"}, "32 images per update: no delay", None),
        ({"batch_size": None, "update_size": 64, "max_delay": 2}, "16 images x 4 per update: D_0 = 1.5 updates", None),
        ({"batch_size": 256, "data_parallel": 2, "stages": 7}, "256 images x 2 replicas per update: D_0 = 12 updates",
         "warning: D_0 = 12 updates, and above 2 with opt=sgd training is expected to lose accuracy: larger "
         "accumulation_steps at the same images per update (update_size=512 max_delay=2), fewer stages, opt=muon (up "
         "to 3)"),
        ({"opt": "muon", "stages": 4}, "32 images per update: D_0 = 6 updates",
         "warning: D_0 = 6 updates, and above 3 with opt=muon training is expected to lose accuracy: larger "
         "accumulation_steps at the same images per update (update_size=32 max_delay=3), fewer stages"),
        ({"opt": "muon", "accumulation_steps": 2}, "32 images x 2 per update: D_0 = 3 updates", None),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_a_run_begins_with_its_update_and_the_delay(
    tmp_path: Path, settings: dict[str, Any], said: str, warned: str | None
) -> None:
    console = Console(record=True, width=200, force_terminal=False, file=(tmp_path / "out").open("w"))
    recipe = Recipe(**{**QUICK, **settings})
    data, _ = open_data(recipe)
    model = build_model(recipe, data)
    pipeline = build_pipeline(recipe, model, 4, preprocessing_for(recipe, data, model))
    Reporter(console).start(recipe, pipeline, 4, 1)
    lines = console.export_text().splitlines()
    console.file.close()
    assert said in lines
    assert [line for line in lines if "warning" in line] == ([warned] if warned else [])


def test_a_terminal_gets_a_progress_bar(tmp_path: Path) -> None:
    console = Console(record=True, width=200, force_terminal=True, file=(tmp_path / "out").open("w"))
    train(Recipe(**QUICK, output=tmp_path / "run"), name="quick", reporter=Reporter(console))
    text = console.export_text()
    console.file.close()
    assert "in flight" in text
    assert "epoch 1" in text


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "petra_revnet5"}, "model 'petra_revnet5' is unknown; nearest: petra_revnet50"),
        ({"model": "resnet50"}, "model 'resnet50': ResNet has no units(): petra-zoo convert makes"),
        ({"model_kwargs": {"depth": 3}}, "unexpected keyword argument 'depth'"),
        ({"model_kwargs": {"coupling": 0.3}}, "multiple of 1/256"),
        (
            {"amp": True, "amp_dtype": "float16", "streams": "fixed16"},
            "scaled in float32 streams; set streams=float32",
        ),
        ({"stages": 15}, "stages=15 does not fit a model of 14 units: choose 1 to 14"),
        ({"split": [4, 4, 4, 4]}, "add up to the model's 14 units, not 16"),
        ({"num_classes": 3}, "num_classes=3, but data set synthetic:4x8x128 has labels 0 to 3"),
        ({"dataset": "folder"}, "data set 'folder' needs data_dir"),
        ({"dataset": "folder", "data_dir": "/nowhere"}, "/nowhere"),
        ({"dataset": "digitz"}, "did you mean digits"),
        ({"model": "petra_revnet50"}, "images of 8x8 are too small for petra_revnet50, which reduces by 32"),
        ({"model": "petra_revnet18_cifar", "pretrained": True}, "No pretrained weights exist"),
        ({"opt_kwargs": {"nonsense": 1}}, "optimizer 'sgd': "),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_mistake_gets_one_line(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        quick(tmp_path, **settings)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists(), "nothing was trained, so nothing should be left behind"


def test_a_gpu_that_is_not_there_is_said(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(UserError, match="torch sees no CUDA device here"):
        quick(tmp_path, device="cuda")


def test_a_directory_with_a_run_is_not_overwritten(tmp_path: Path) -> None:
    result = quick(tmp_path)
    before = (result.path / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="of a run with other settings: seed was 42 and is 3"):
        quick(tmp_path, seed=3)
    assert (result.path / "model.safetensors").read_bytes() == before


def test_a_full_disk_while_saving_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second epoch's save fails half-way; the first epoch's files are still whole."""
    real, calls, first = run_directory.save_for_hf, [], {}

    def fails_the_second_time(model: Any, folder: str, **kwargs: Any) -> None:
        calls.append(folder)
        if len(calls) == 2:
            first.update({p.name: p.read_bytes() for p in Path(folder).parent.iterdir() if p.is_file()})
            (Path(folder) / "model.safetensors").write_bytes(b"half")
            raise OSError(28, "No space left on device")
        real(model, folder, **kwargs)

    monkeypatch.setattr(run_directory, "save_for_hf", fails_the_second_time)
    with pytest.raises(UserError, match="No space left on device; what was saved before is untouched"):
        quick(tmp_path, epochs=2)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "run" / name).read_bytes() == first[name]
    assert timm.create_model(f"local-dir:{tmp_path / 'run'}", pretrained=True) is not None
    assert not list((tmp_path / "run").glob(".saving-*"))


def test_a_really_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """safetensors meets the device that is always full."""
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    result = quick(tmp_path)
    before = (result.path / "model.safetensors").read_bytes()
    directory = run_directory.RunDirectory.__new__(run_directory.RunDirectory)
    directory.path = result.path
    real = run_directory.save_for_hf

    def onto_a_full_disk(model: Any, folder: str, **kwargs: Any) -> None:
        with Path("/dev/full").open("wb", buffering=0) as full:
            full.write(b"x")
        real(model, folder, **kwargs)

    monkeypatch.setattr(run_directory, "save_for_hf", onto_a_full_disk)
    with pytest.raises(UserError, match="No space left on device"):
        directory.save_model(load_model(str(result.path), torch.device("cpu")), None, [])
    assert (result.path / "model.safetensors").read_bytes() == before


def test_a_corrupt_image_stops_training_by_name_or_is_skipped(tmp_path: Path) -> None:
    from PIL import Image

    for split, count in (("train", 20), ("val", 6)):
        for i in range(count):
            folder = tmp_path / "data" / split / ("cat", "dog")[i % 2]
            folder.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (i * 10, 0, 100)).save(folder / f"{i:02}.png")
    (tmp_path / "data" / "train" / "cat" / "04.png").write_bytes(b"not an image")
    settings = {"dataset": "folder", "data_dir": tmp_path / "data", "img_size": 8, "batch_size": 10}
    with pytest.raises(UserError, match=r"04\.png cannot be read"):
        quick(tmp_path / "a", **settings)
    result = quick(tmp_path / "b", **settings, on_bad_image="skip")
    assert result.bad_images == 1


def test_evaluating_a_directory_without_a_model_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no config\.json"):
        evaluate_checkpoint(str(tmp_path), "digits")


def test_evaluating_on_more_classes_than_the_model_has_is_refused(tmp_path: Path) -> None:
    result = quick(tmp_path)
    with pytest.raises(UserError, match="tells 4 classes apart, data set digits has 10"):
        evaluate_checkpoint(str(result.path), "digits")


def test_a_truncated_checkpoint_is_one_line(tmp_path: Path) -> None:
    result = quick(tmp_path)
    path = result.path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="the weights are damaged") as caught:
        evaluate_checkpoint(str(result.path), "synthetic:4x8x128")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("norm", "warned"), [("groupnorm1", True), ("batchnorm2d", False)])
def test_a_network_without_batch_norm_is_warned_of_a_delay(norm: str, warned: bool) -> None:
    settings = {**QUICK, "model_kwargs": {"norm_layer": norm}, "stages": 2, "accumulation_steps": 1, "opt": "muon"}
    recipe, said = Recipe(**settings), io.StringIO()
    prepared = prepare(recipe)
    Reporter(Console(file=said, width=200)).start(recipe, prepared.pipeline, len(prepared.train_loader), 1)
    assert ("without batch norm a delay costs more" in said.getvalue()) == warned
