"""petra_revnet_tiny.digits, the checkpoint in the package: it is the one whose results are committed."""

import hashlib
import json
import socket
from pathlib import Path

import pytest
import timm
import torch
from timm.data import resolve_model_data_config

import petra_zoo  # noqa: F401  (importing it registers our models)
from petra_zoo.evaluation.checkpoint_evaluation import evaluate_checkpoint
from petra_zoo.models.petra_revnet import DIGITS_WEIGHTS
from petra_zoo.settings.recipe_files import load_recipe
from petra_zoo.training.run import train

RESULTS = json.loads((Path(__file__).parents[2] / "benchmarks" / "bundled_checkpoint" / "results.json").read_text())


def test_it_is_the_file_whose_results_are_committed() -> None:
    assert hashlib.sha256(DIGITS_WEIGHTS.read_bytes()).hexdigest() == RESULTS["sha256"]
    assert RESULTS["identical_when_trained_again"]
    assert RESULTS["bundled_seed"] == load_recipe(RESULTS["recipe"]).seed == RESULTS["runs"][0]["seed"]
    assert len({run["seed"] for run in RESULTS["runs"]}) >= 5
    assert DIGITS_WEIGHTS.stat().st_size < 1.5e6


def test_it_loads_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(*_: object) -> None:
        raise AssertionError("pretrained=True went to the network")

    monkeypatch.setattr(socket.socket, "connect", connect)
    model = timm.create_model("petra_revnet_tiny", pretrained=True).eval()
    assert model.pretrained_cfg["tag"] == "digits"
    assert [layer.g() for layer in model.coupled_layers()] == [1.0] * 4  # as PETRA trained it
    config = resolve_model_data_config(model)
    assert (config["input_size"], config["crop_pct"], model.num_classes) == ((3, 8, 8), 1.0, 10)
    assert model(torch.zeros(1, *config["input_size"])).shape == (1, 10)


def test_it_scores_what_its_results_say() -> None:
    evaluation = evaluate_checkpoint("petra_revnet_tiny.digits", "digits").evaluation
    assert abs(evaluation.top1 - RESULTS["runs"][0]["top1"]) <= 100 / evaluation.images + 1e-9  # one image


def test_it_can_be_fine_tuned_on_other_classes_and_channels() -> None:
    model = timm.create_model("petra_revnet_tiny", pretrained=True, num_classes=3, in_chans=1).train()
    model(torch.randn(4, 1, 16, 16)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.slow
def test_training_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    files = []
    for name in ("first", "second"):
        train(load_recipe(RESULTS["recipe"], ["epochs=3", "warmup_epochs=1", f"output={tmp_path / name}"]))
        files.append((tmp_path / name / "model.safetensors").read_bytes())
    assert files[0] == files[1]
