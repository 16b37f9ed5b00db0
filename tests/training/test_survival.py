"""Launched runs whose processes are killed or told to stop: they go on to the bits of an undisturbed run."""

import os
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from petra_zoo.checkpoints.store import Store
from tests.training.test_launch import COMMAND, ENVIRONMENT, needs_proc, run, state, workers_of

pytestmark = [pytest.mark.dist, pytest.mark.slow, pytest.mark.timeout(600), needs_proc]

SAVING = ["checkpoint_every=2 ticks", "log_interval=1", "model_ema=true", "accumulation_steps=2"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("undisturbed") / "run"
    done = run(f"output={path}", *SAVING, "checkpoint_every=null")
    assert done.returncode == 0, done.stderr
    return path


def start(path: Path, *options: str) -> subprocess.Popen[str]:
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*COMMAND, *SAVING, f"output={path}", *options], env=ENVIRONMENT, **pipes)


def wait_for_checkpoint(process: subprocess.Popen[str], path: Path, tick: int) -> None:
    while not any(int(name[5:]) >= tick for name in Store(path / "checkpoints").names()):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def assert_same(path: Path, undisturbed: Path) -> None:
    a, b = state(path), state(undisturbed)
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    assert (path / "summary.csv").read_text() == (undisturbed / "summary.csv").read_text()


@pytest.mark.parametrize("seed", range(3))
def test_a_killed_worker_costs_nothing_but_time(seed: int, tmp_path: Path, undisturbed: Path) -> None:
    draw = random.Random(seed)
    path = tmp_path / "run"
    process = start(path, "--nproc", "2", "--max-restarts", "1")
    wait_for_checkpoint(process, path, draw.randrange(2, 16))
    os.kill(workers_of(process.pid)[draw.randrange(2)], signal.SIGKILL)
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
    assert "goes on from" in out
    assert_same(path, undisturbed)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_launched_run_that_is_told_to_stop_goes_on_with_another_number_of_processes(
    number: int, tmp_path: Path, undisturbed: Path
) -> None:
    path = tmp_path / "run"
    process = start(path, "--nproc", "2")
    wait_for_checkpoint(process, path, 4)
    process.send_signal(number)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 75, err
    assert f"stopped by {signal.Signals(number).name}" in err
    done = run(*SAVING, f"output={path}", "--nproc", "4")
    assert done.returncode == 0, done.stderr
    assert "goes on from" in done.stdout
    assert_same(path, undisturbed)
