"""The study of a training step: contenders that compute the same, and what is measured of them."""

from pathlib import Path

import pytest
import torch

from petra_zoo.bench.results import Record, Results
from petra_zoo.bench.speed import SpeedStudy, speed_tables
from petra_zoo.bench.step_contenders import build_contender
from petra_zoo.bench.step_runs import norm_updates, training_step
from petra_zoo.bench.steps import LAYER, STREAMS, StepShape, installed
from petra_zoo.bench.turns import median_ratio, take_turns

SMALL = StepShape(blocks=4, channels=4, batch_size=2, img_size=6)


@pytest.mark.parametrize("names", [STREAMS, LAYER[1:]], ids=["streams", "our layers"])
def test_contenders_compute_the_same_step(names: tuple[str, ...]) -> None:
    losses, norms = [], []
    for name in filter(installed, names):
        model, x = build_contender(name, SMALL)
        losses.append(training_step(model, x))
        norms.append(sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None))
    torch.testing.assert_close(losses, [losses[0]] * len(losses), rtol=1e-5, atol=0)
    torch.testing.assert_close(norms, [norms[0]] * len(norms), rtol=1e-4, atol=0)


def test_our_blocks_update_their_statistics_once_per_step() -> None:
    assert norm_updates(*build_contender("petra-zoo", SMALL)) == 1


def test_contenders_take_turns_in_orders_of_their_own_after_the_warm_up() -> None:
    log: list[str] = []

    def block(name: str, seconds: float) -> float:
        log.append(name)
        return seconds

    seconds = take_turns({"slow": lambda: block("slow", 3.0), "fast": lambda: block("fast", 2.0)}, 8, warm_up=2)
    assert seconds == {"slow": [3.0] * 8, "fast": [2.0] * 8}
    rounds = {tuple(log[i : i + 2]) for i in range(0, len(log), 2)}
    assert len(log) == 20
    assert rounds == {("slow", "fast"), ("fast", "slow")}
    assert median_ratio(seconds["slow"], seconds["fast"]) == 1.5


def test_a_run_measures_a_contender_beside_its_references() -> None:
    study, results = SpeedStudy.small(), Results("speed", "speed")
    trials = {trial.contender: trial for trial in study.trials(results)}
    trial = trials["petra-zoo reversible"]
    result = study.run(trial)
    assert result["batch_norm_updates"] == 1
    assert {"step_ms", "over_reference", "over_plain_memory", "bytes_per_block"} <= result.keys()
    results.add(Record(trial.contender, 0, trial.settings, study.command(trial), result))
    assert "| layer | petra-zoo reversible |" in speed_tables(results)["step"]


def test_a_transformer_is_measured_beside_its_plain_step() -> None:
    study, results = SpeedStudy.small(), Results("speed", "speed")
    trials = [trial for trial in study.trials(results) if trial.settings.get("part") == "transformer"]
    assert "g = 1, branches" in {trial.contender for trial in trials}
    trial = trials[-1]
    result = study.run(trial)
    assert result["least_over_reference"] <= result["over_reference"] <= result["most_over_reference"]
    results.add(Record(trial.contender, 0, trial.settings, study.command(trial), result))
    tables = speed_tables(results)
    assert f"| test_vit | 2 | {trial.contender} |" in tables["transformers"]
    assert "test_vit" not in tables["step"]


def test_a_reference_is_measured_once() -> None:
    study = SpeedStudy.small()
    (trial,) = (trial for trial in study.trials(Results("speed", "speed")) if trial.contender == "plain")
    assert study.run(trial)["over_reference"] == 1.0


@pytest.mark.slow
def test_a_recipe_is_measured_by_training_it() -> None:
    study = SpeedStudy.small()
    (trial,) = (trial for trial in study.trials(Results("speed", "speed")) if trial.contender in study.recipes)
    speed = study.run(trial)["images_per_second"]
    assert isinstance(speed, float)
    assert speed > 0


def test_the_committed_results_are_of_the_study_as_it_is() -> None:
    path = Path(__file__).parents[2] / "benchmarks" / "speed" / "results.json"
    results, study = Results.read(path), SpeedStudy()
    steps = [trial for trial in study.trials(results) if trial.contender not in study.recipes]
    assert all(trial in results for trial in steps)
