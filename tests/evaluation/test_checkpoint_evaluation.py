"""Evaluating several models, with little memory, and comparing two."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

from petra_zoo.data.datasets import open_dataset
from petra_zoo.data.loader import create_loader
from petra_zoo.data.preprocessing import Preprocessing
from petra_zoo.errors import Failure, UserError
from petra_zoo.evaluation.checkpoint_evaluation import EvaluationOptions, evaluate_checkpoint, evaluate_checkpoints
from petra_zoo.evaluation.comparison import compare, mcnemar
from petra_zoo.evaluation.watch import is_out_of_memory
from petra_zoo.settings.recipe_files import make_recipe, save_recipe
from petra_zoo.training.run_directory import RunDirectory
from tests.cli.test_main import petra_zoo
from tests.hub.checkpoints import untrained

DATA = "synthetic:4x8x128"


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("two")
    paths = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        paths.append(str(untrained(folder / f"seed{seed}", num_classes=4)))
    return paths


def test_a_model_whose_logits_are_not_finite_has_no_accuracy(tmp_path: Path) -> None:
    path = untrained(tmp_path / "diverged", num_classes=4)
    weights = load_file(path / "model.safetensors")
    weights["fc.bias"][2] = torch.nan
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(Failure, match="logits on synthetic:4x8x128 that are not finite"):
        evaluate_checkpoint(str(path), DATA)


def test_several_models_give_timms_results_and_their_memory(two: list[str], tmp_path: Path) -> None:
    done = petra_zoo("evaluate", *two, "--dataset", DATA, "--results-file", tmp_path / "r.csv", "--json")
    assert [row["model"] for row in json.loads(done.stdout)] == two
    with (tmp_path / "r.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["model"] for row in rows] == two
    weights = sum(p.numel() * 4 for p in timm.create_model("petra_revnet_tiny", num_classes=4).parameters()) / 2**20
    assert all(float(row["peak_memory_mib"]) > weights for row in rows)


def test_a_model_of_timm_is_evaluated(tmp_path: Path) -> None:
    model = timm.create_model("resnet18", num_classes=4)
    timm.models.save_for_hf(
        model, str(tmp_path / "m"), safe_serialization=True, data_config={"input_size": (3, 32, 32)}
    )
    assert (
        evaluate_checkpoint(str(tmp_path / "m"), DATA, options=EvaluationOptions(batch_size=512)).evaluation.images
        == 128
    )


def test_memory_grows_with_the_batch(two: list[str]) -> None:
    small, large = (
        evaluate_checkpoint(two[0], DATA, options=EvaluationOptions(batch_size=n)).peak_memory for n in (64, 512)
    )
    image = 3 * 8 * 8 * 4
    assert large - small > (512 - 64) * image


def test_a_model_that_is_missing_is_known_before_the_first_is_evaluated(two: list[str]) -> None:
    with pytest.raises(UserError, match="no run directory"):
        next(evaluate_checkpoints([two[0], "no/such/run"], DATA))


def test_runs_of_different_data_are_not_compared_before_either_is_evaluated(two: list[str], tmp_path: Path) -> None:
    runs = [shutil.copytree(path, tmp_path / Path(path).name) for path in two]
    for run, data in zip(runs, (DATA, "digits"), strict=True):
        save_recipe(make_recipe({"model": "petra_revnet_tiny", "dataset": data}), run / "recipe.yaml")
    with pytest.raises(UserError, match=r"seed0 on synthetic:4x8x128 and .*seed1 on digits: .*name one --dataset"):
        next(evaluate_checkpoints([str(run) for run in runs], options=EvaluationOptions(fingerprints=True)))


def test_a_model_agrees_with_itself(two: list[str]) -> None:
    report = evaluate_checkpoint(two[0], DATA, options=EvaluationOptions(fingerprints=True))
    found = compare(report, report)
    assert (found.agreement, found.only_first_right, found.only_second_right, found.p_value) == (100.0, 0, 0, 1.0)


def test_two_models_are_compared_image_by_image(two: list[str]) -> None:
    found = json.loads(petra_zoo("evaluate", *two, "--dataset", DATA, "--compare", "--json").stdout)
    first, second = found["models"]
    difference = found["comparison"]["only_first_right"] - found["comparison"]["only_second_right"]
    assert difference == round((first["top1"] - second["top1"]) * first["images"] / 100)
    text = petra_zoo("evaluate", *two, "--dataset", DATA, "--compare").stdout
    assert "agree on" in text
    assert "McNemar" in text


@pytest.mark.slow
def test_comparing_needs_two_models_and_the_same_images(two: list[str]) -> None:
    done = petra_zoo("evaluate", two[0], "--dataset", DATA, "--compare")
    assert done.returncode == 2
    assert "--compare takes two models" in done.stderr
    reports = [
        evaluate_checkpoint(two[0], data, options=EvaluationOptions(batch_size=512, fingerprints=True))
        for data in (DATA, "synthetic:3x8x128", "synthetic:4x9x128")
    ]
    with pytest.raises(UserError, match="on the same images, but with other labels"):
        compare(*reports[:2])
    with pytest.raises(UserError, match="not evaluated on the same images"):
        compare(reports[0], reports[2])


def test_a_bad_image_is_left_out_and_counts_nowhere(two: list[str], tmp_path: Path) -> None:
    for number in range(9):
        folder = tmp_path / "val" / "abcd"[number % 4]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    arguments = ("--dataset", "folder", "--data-dir", tmp_path, "--on-bad-image", "skip", "--batch-size", 4)
    (tmp_path / "val" / "a" / "0.png").write_bytes(b"no image")
    done = petra_zoo("evaluate", two[0], *arguments)
    assert "8 of 9 images" in done.stdout
    assert "1 unreadable image left out" in done.stdout
    skipped = json.loads(petra_zoo("evaluate", two[0], *arguments, "--json").stdout)
    (tmp_path / "val" / "a" / "0.png").unlink()
    without = json.loads(petra_zoo("evaluate", two[0], *arguments, "--json").stdout)
    assert (skipped["images"], skipped["bad_images"]) == (8, 1)
    for key in ("top1", "top5", "loss"):
        assert skipped[key] == pytest.approx(without[key], rel=1e-5), key
    assert skipped["worst_classes"] == without["worst_classes"]


@pytest.mark.parametrize(("arguments", "expected"), [((), ("16", "1.0")), (("--use-train-size",), ("8", "0.8"))])
def test_a_checkpoints_test_size_is_used_as_timms_validation_does(
    tmp_path: Path, arguments: tuple[str, ...], expected: tuple[str, str]
) -> None:
    data_config = {"input_size": (3, 8, 8), "crop_pct": 0.8, "test_input_size": (3, 16, 16), "test_crop_pct": 1.0}
    model = timm.create_model("petra_revnet_tiny", num_classes=4)
    timm.models.save_for_hf(model, str(tmp_path / "m"), safe_serialization=True, data_config=data_config)
    results = tmp_path / "r.csv"
    done = petra_zoo("evaluate", tmp_path / "m", "--dataset", DATA, "--results-file", results, *arguments)
    assert done.returncode == 0, done.stderr
    with results.open() as file:
        (row,) = csv.DictReader(file)
    assert (row["img_size"], row["crop_pct"]) == expected


def test_a_run_is_not_tested_at_the_size_of_the_weights_it_started_from(tmp_path: Path) -> None:
    recipe = make_recipe({"model": "petra_revnet_tiny", "dataset": DATA, "output": str(tmp_path / "run")})
    model = timm.create_model("petra_revnet_tiny", num_classes=4)
    model.pretrained_cfg |= {"test_input_size": (3, 16, 16), "test_crop_pct": 1.0}
    preprocessing = Preprocessing((3, 8, 8), (0.5,) * 3, (0.5,) * 3, crop_pct=0.8)
    RunDirectory(recipe, "run").save_model(model, preprocessing, list("abcd"))
    report = evaluate_checkpoint(str(tmp_path / "run"), DATA, options=EvaluationOptions(batch_size=512))
    assert (report.preprocessing.input_size, report.preprocessing.crop_pct) == ((3, 8, 8), 0.8)


def test_images_are_cropped_as_the_checkpoints_config_says(tmp_path: Path) -> None:
    """`squash` shows the whole of an oblong image, `center` its middle."""
    oblong = np.zeros((8, 24, 3), dtype=np.uint8)
    oblong[:, 8:16] = 255
    (tmp_path / "val" / "a").mkdir(parents=True)
    Image.fromarray(oblong).save(tmp_path / "val" / "a" / "0.png")
    seen = []
    for crop_mode in ("center", "squash"):
        loader = create_loader(
            open_dataset("folder", "val", data_dir=tmp_path),
            Preprocessing((3, 8, 8), (0.0,) * 3, (1.0,) * 3, crop_pct=1.0, crop_mode=crop_mode), batch_size=1,
        )  # fmt: skip
        seen.append(float(next(iter(loader))[0].mean()))
    assert seen == pytest.approx([1.0, 1 / 3], abs=0.02)


def test_without_fingerprints_nothing_is_compared(two: list[str]) -> None:
    report = evaluate_checkpoint(two[0], DATA, options=EvaluationOptions(batch_size=512))
    with pytest.raises(ValueError, match="fingerprints=True"):
        compare(report, report)


def test_mcnemar_by_hand() -> None:
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(5, 5) == 1.0
    assert mcnemar(0, 5) == 2 / 32
    assert mcnemar(1, 9) == pytest.approx(2 * 11 / 1024)
    assert mcnemar(3000, 3300) < 1e-3


@given(st.integers(0, 200), st.integers(0, 200))
def test_mcnemar_is_a_probability_and_symmetric(b: int, c: int) -> None:
    assert 0.0 < mcnemar(b, c) == mcnemar(c, b) <= 1.0


# A process that may take only a little more memory than it has: 1,024 images of 32x32 at once do not fit.
EVALUATE_IN_LITTLE_MEMORY = """
import resource, sys
from petra_zoo.errors import Failure, UserError
from petra_zoo.evaluation.checkpoint_evaluation import EvaluationOptions, evaluate_checkpoint
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 200 * 2**20,) * 2)
try:
    evaluate_checkpoint(sys.argv[1], "synthetic:4x32", options=EvaluationOptions(batch_size=1024, device="cpu"))
except UserError as error:
    print(error)
options = EvaluationOptions(batch_size=1024, device="cpu", retry=True)
print(evaluate_checkpoint(sys.argv[1], "synthetic:4x32", options=options).batch_size)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the address space as Linux does")
def test_where_memory_runs_out_a_smaller_batch_is_tried(tmp_path: Path) -> None:
    model = untrained(tmp_path / "tiny", num_classes=4)
    config = json.loads((model / "config.json").read_text())
    config["pretrained_cfg"]["input_size"] = [3, 32, 32]
    (model / "config.json").write_text(json.dumps(config))
    command = [sys.executable, "-c", EVALUATE_IN_LITTLE_MEMORY, str(model)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    once, retried = done.stdout.splitlines()
    assert "out of memory with a batch size of 1024: use a smaller --batch-size, or --retry" in once
    assert 1 <= int(retried) < 1024


def test_what_is_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
