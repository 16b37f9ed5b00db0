"""TensorBoard and Weights & Biases follow metrics.jsonl: neither gaps nor doubles, whatever happens to a run.

Stand-ins that keep what they are given take the place of both packages.
"""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from petra_zoo.errors import UserError
from petra_zoo.training import log_writers
from petra_zoo.training.stopping import RunStopped
from tests.training.test_resume import go

Scalars = list[tuple[str, float, int]]


class FakeSummaryWriter:
    """Appends scalars to a file like an event file's."""

    def __init__(self, folder: str) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        number = len(list(Path(folder).iterdir()))
        self.file = Path(folder, f"events.out.tfevents.{number}").open("a", encoding="utf-8")

    def add_scalar(self, name: str, number: float, step: int) -> None:
        self.file.write(json.dumps([name, number, step]) + "\n")

    def close(self) -> None:
        self.file.close()


class FakeRun:
    """A run of Weights & Biases: what a server has of it outlives the process; steps must grow."""

    def __init__(self, log: dict[int, dict[str, float]]) -> None:
        self.history = log
        self.step = max(log, default=-1) + 1

    def define_metric(self, name: str, step_metric: str) -> None:
        pass

    def log(self, values: dict[str, float], step: int) -> None:
        assert step not in self.history, "handed over twice"
        self.history[step] = values

    def finish(self) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[int, dict[str, float]]]:
    """Puts stand-ins in the place of both packages; what Weights & Biases have, by run."""
    runs: dict[str, dict[int, dict[str, float]]] = {}
    tensorboard, wandb = ModuleType("torch.utils.tensorboard"), ModuleType("wandb")
    vars(tensorboard)["SummaryWriter"] = FakeSummaryWriter
    vars(wandb)["init"] = lambda id, **_: FakeRun(runs.setdefault(id, {}))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", tensorboard)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(log_writers, "find_spec", lambda name: name)
    return runs


def events(run: Path) -> Scalars:
    lines = [line for file in sorted((run / "tensorboard").iterdir()) for line in file.read_text().splitlines()]
    return [tuple(json.loads(line)) for line in lines]


def numbers_in_the_log(run: Path) -> list[tuple[str, float]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [pair for line in lines for pair in log_writers._numbers(line).items()]


def test_a_missing_package_is_one_line_with_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_writers, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"log_to: wandb is not installed: pip install 'petra-zoo\[wandb\]'"):
        go(tmp_path / "run", {"log_to": ["wandb"]})
    assert not (tmp_path / "run").exists()


def test_a_run_that_goes_on_has_neither_gaps_nor_doubles(
    tmp_path: Path, server: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"log_to": ["tensorboard", "wandb"], "log_interval": 1, "epochs": 1, "checkpoint_every": "2 ticks"}
    with pytest.raises(RunStopped):
        go(tmp_path / "run", settings, max_seconds=0.0)
    # What a process that dies has written since its last checkpoint.
    extra = {"event": "train", "epoch": 1, "update": 1, "tick": 2, "loss": 9.0, "top1": 0.0, "lr": 0.1}
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(extra) + "\n")
    late = log_writers.TensorBoardWriter(tmp_path / "run")
    late.begin([extra])
    late.close()
    go(tmp_path / "run", settings)
    expected = numbers_in_the_log(tmp_path / "run")
    assert [(name, number) for name, number, _ in events(tmp_path / "run")] == expected
    assert {step for name, _, step in events(tmp_path / "run") if name == "val/top1"} == {1}
    (history,) = server.values()
    assert sorted(history) == list(range(len(history)))
    handed_over = [pair for step in sorted(history) for pair in history[step].items() if "/" in pair[0]]
    assert handed_over == expected


def test_what_was_handed_over_before_a_run_went_back_is_not_again(tmp_path: Path, server: dict[str, Any]) -> None:
    lines: list[Any] = [{"event": "train", "epoch": 0, "tick": n, "loss": float(n)} for n in range(5)]
    for known, new in ((0, lines), (2, lines[2:])):  # dies behind five lines, goes on from two
        writer = log_writers.WandbWriter(tmp_path, {})
        writer.begin(lines[:known])
        for line in new:
            writer.write(line)
        writer.close()
    (history,) = server.values()
    assert [history[n]["train/loss"] for n in range(5)] == [0.0, 1.0, 2.0, 3.0, 4.0]
