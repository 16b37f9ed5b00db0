"""The Python way in: `train` by name, file or recipe, and what callbacks are told."""

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest

import petra_zoo.training as training
from petra_zoo.data.datasets import DATASETS, register_dataset
from petra_zoo.errors import UserError
from petra_zoo.settings.recipe import Recipe
from petra_zoo.settings.recipe_files import save_recipe
from petra_zoo.training import Callback, Reporter, Result, train
from petra_zoo.training.losses import LOSSES, register_loss
from tests.data.test_datasets import Squares
from tests.petra.processes import run_processes
from tests.training.test_train import QUICK

QUIET = Reporter(quiet=True)
EVENTS = (training.StartEvent, training.LogEvent, training.ValidationEvent, training.EndEvent)


class Heard(Callback):
    """Keeps all events."""

    def __init__(self) -> None:
        self.events: list[Any] = []

    def on_start(self, event: training.StartEvent) -> None:
        self.events.append(event)

    on_log = on_validation = on_end = on_start  # type: ignore[assignment]

    def of(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


def heard(tmp_path: Path, **settings: Any) -> tuple[Heard, Result]:
    listener = Heard()
    recipe = Recipe(**{**QUICK, "batch_size": 16, "log_interval": 2, "output": tmp_path / "run", **settings})
    return listener, train(recipe, callbacks=[listener], reporter=QUIET)


def test_a_callback_is_told_what_the_run_directory_says(tmp_path: Path) -> None:
    listener, result = heard(tmp_path, epochs=2)
    kinds = [type(event) for event in listener.events]
    assert kinds[0] is training.StartEvent
    assert kinds[-1] is training.EndEvent
    (start,) = listener.of(training.StartEvent)
    assert (start.path, start.epochs, start.batches_per_epoch) == (tmp_path / "run", 2, 8)
    assert (start.stages, start.processes, start.delay) == (4, 1, 6.0)
    assert start.parameters > 100_000
    lines = [json.loads(line) for line in (result.path / "metrics.jsonl").read_text().splitlines()]
    assert [asdict(event) for event in listener.of(training.LogEvent)] == [
        {key: value for key, value in line.items() if key != "event"} for line in lines if line["event"] == "train"
    ]
    validations = listener.of(training.ValidationEvent)
    assert [event.epoch for event in validations] == [1, 2]
    assert [(event.loss, event.top1) for event in validations] == [
        (line["loss"], line["top1"]) for line in lines if line["event"] == "validation"
    ]
    (end,) = listener.of(training.EndEvent)
    assert (end.path, end.loss, end.top1) == (
        result.path,
        result.evaluation.loss,
        result.evaluation.top1,
    )


def test_events_are_plain_numbers() -> None:
    for kind in EVENTS:
        assert {field.type for field in fields(kind)} <= {"int", "float", "float | None", "bool", "Path"}


def test_nothing_is_logged_between_the_intervals(tmp_path: Path) -> None:
    listener, _ = heard(tmp_path, log_interval=100)
    assert listener.of(training.LogEvent) == []
    assert len(listener.of(training.ValidationEvent)) == 1


def test_a_callback_that_raises_ends_the_run_with_its_own_error(tmp_path: Path) -> None:
    class Stops(Callback):
        def on_validation(self, event: training.ValidationEvent) -> None:
            raise LookupError("good enough")

    recipe = Recipe(**QUICK, output=tmp_path / "run")
    with pytest.raises(LookupError, match="good enough"):
        train(recipe, callbacks=[Stops()], reporter=QUIET)
    assert (tmp_path / "run" / "model.safetensors").exists(), "it is called when the model is saved"


def test_callbacks_change_no_bits(tmp_path: Path) -> None:
    plain = train(Recipe(**QUICK, output=tmp_path / "plain"), reporter=QUIET)
    watched = train(Recipe(**QUICK, output=tmp_path / "watched"), callbacks=[Heard(), Heard()], reporter=QUIET)
    first, second = ((run.path / "model.safetensors").read_bytes() for run in (plain, watched))
    assert first == second


def test_a_recipe_is_an_object_a_file_or_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_recipe(Recipe(**QUICK), tmp_path / "mine.yaml")
    (tmp_path / "extended.yaml").write_text("extends: mine.yaml\nseed: 7\n")
    by_object = train(Recipe(**QUICK), ["seed=7"], reporter=QUIET)
    by_file = train(tmp_path / "extended.yaml", reporter=QUIET)
    assert by_object.path.name.startswith("run-")
    assert by_file.path.name.startswith("extended-")
    assert by_object.evaluation.loss == by_file.evaluation.loss
    saved = (by_file.path / "recipe.yaml").read_text()
    assert "extends" not in saved
    assert "seed: 7\n" in saved
    by_name = train("digits/petra_revnet_tiny", ["epochs=1", "stages=1", "batch_size=512"], reporter=QUIET)
    assert by_name.path.name.startswith("digits-petra_revnet_tiny-")


def test_a_mistake_in_python_is_the_same_line() -> None:
    with pytest.raises(ValueError, match="unknown recipe 'digit/petra_revnet_tiny'"):
        train("digit/petra_revnet_tiny")
    with pytest.raises(UserError, match="unknown setting 'epoch'"):
        train(Recipe(**QUICK), ["epoch=3"])
    with pytest.raises(UserError, match=r"inherits from petra_zoo.training.Callback, not <built-in function print>"):
        train(Recipe(**QUICK), callbacks=[print])  # type: ignore[list-item]


def test_a_registered_data_set_and_loss_train(tmp_path: Path) -> None:
    seen = []
    with DATASETS.restored(), LOSSES.restored():
        register_dataset("squares")(lambda split, data_dir: Squares(split))

        @register_loss("scaled")
        def scaled(logits: Any, labels: Any) -> Any:
            seen.append(tuple(logits.shape))
            return 2.0 * LOSSES.find("cross_entropy")(logits, labels)

        settings = {"dataset": "squares", "loss": "scaled", "batch_size": 8, "lr": 0.01}
        result = train(Recipe(**{**QUICK, **settings}, output=tmp_path / "run"), reporter=QUIET)
    assert set(seen) == {(8, 2)}
    assert result.evaluation.images == 4
    with pytest.raises(UserError, match="unknown loss 'scaled'"):
        train(Recipe(**QUICK, loss="scaled"), reporter=QUIET)
    with pytest.raises(UserError, match="there is a loss 'bce' already"):
        register_loss("bce")(scaled)


def listen_in_one_of_two(folder: str) -> list[str]:
    listener, _ = heard(Path(folder), balance="operations", device="cpu")
    return [type(event).__name__ for event in listener.events]


@pytest.mark.dist
@pytest.mark.slow  # two processes import torch
@pytest.mark.timeout(120)
def test_only_the_process_that_sees_the_losses_is_told(tmp_path: Path) -> None:
    first, last = run_processes(2, tmp_path, listen_in_one_of_two, str(tmp_path))
    assert first == []
    assert last == ["StartEvent", "LogEvent", "LogEvent", "LogEvent", "ValidationEvent", "EndEvent"]
