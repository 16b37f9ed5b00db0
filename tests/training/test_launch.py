"""Runs of several processes: started, agreeing, and ended together."""

import argparse
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed import run as torchrun

from petra_zoo.errors import Failure
from petra_zoo.training.launch import as_worker, launch

pytestmark = [pytest.mark.dist, pytest.mark.timeout(300)]

SETTINGS = ["epochs=1", "stages=4", "batch_size=64", "drop=0.1", "balance=operations"]
COMMAND = [sys.executable, "-m", "petra_zoo", "train", "digits/petra_revnet_tiny", *SETTINGS]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**ENVIRONMENT, **environment}, timeout=280)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_ranks(*overrides: list[str], places: list[Path] | None = None) -> list[subprocess.CompletedProcess[str]]:
    """One process per list of overrides, started by hand, as on several machines; each in a place of its own."""
    shared = {"WORLD_SIZE": str(len(overrides)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    started = [
        subprocess.Popen(
            [*COMMAND, *own],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**ENVIRONMENT, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=places[rank] if places else None,
        )
        for rank, own in enumerate(overrides)
    ]
    done = [(process, *process.communicate(timeout=280)) for process in started]
    return [subprocess.CompletedProcess(p.args, p.returncode, out, err) for p, out, err in done]


def state(run_directory: Path) -> dict[str, torch.Tensor]:
    return load_file(run_directory / "model.safetensors")


def test_a_launched_run_saves_the_bits_of_a_run_in_one_process(tmp_path: Path) -> None:
    one = run(f"output={tmp_path / 'one'}")
    two = run(f"output={tmp_path / 'two'}", "--nproc", "2")
    assert (one.returncode, two.returncode) == (0, 0), two.stderr
    assert "1 thread each, 2 processes on 1 machine, messages by gloo" in two.stdout
    assert "predicted efficiency" in two.stdout
    a, b = state(tmp_path / "one"), state(tmp_path / "two")
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    summaries = [(tmp_path / name / "summary.csv").read_text() for name in ("one", "two")]
    assert summaries[0] == summaries[1]


def test_processes_that_do_not_see_one_run_directory_end_before_they_train(tmp_path: Path) -> None:
    places = [tmp_path / "here", tmp_path / "there"]
    for place in places:  # as two machines with disks of their own, where such a directory may be, too
        (place / "runs").mkdir(parents=True)
    done = run_ranks(*(["output=runs/first"] for _ in places), places=places)
    assert [process.returncode for process in done] == [2, 2]
    said = "".join(process.stderr for process in done)
    assert re.search(r"runs/first on \S+, where the run is written, is not what \S+ has under that name", said)
    assert "epoch" not in done[-1].stdout


@pytest.mark.slow
def test_a_run_without_checkpoints_needs_no_shared_directory(tmp_path: Path) -> None:
    places = [tmp_path / "here", tmp_path / "there"]
    for place in places:
        place.mkdir()
    done = run_ranks(*(["output=runs/first", "checkpoint_every=null"] for _ in places), places=places)
    assert [process.returncode for process in done] == [0, 0], done[-1].stderr
    assert [(place / "runs/first/model.safetensors").exists() for place in places] == [False, True]


@pytest.mark.parametrize("words", ["CUDA out of memory. Tried to allocate 2.00 GiB", "can't allocate memory: 16 bytes"])
def test_a_run_that_is_out_of_memory_says_so_in_a_line(words: str) -> None:
    def work() -> None:
        raise RuntimeError(words)

    with pytest.raises(Failure, match=r"^out of memory: smaller micro-batches .* what was saved before is kept$"):
        as_worker(work)


def test_other_errors_of_a_run_keep_their_traceback() -> None:
    def work() -> None:
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        as_worker(work)


def test_the_launcher_needs_no_option_that_torch_2_11_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "")  # restored afterwards
    monkeypatch.delenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT")
    newest, started = torchrun.parse_args, []

    def parse_as_2_11_does(arguments: list[str]) -> argparse.Namespace:
        if "--shutdown-timeout" in arguments:
            sys.exit("torchrun: error: unrecognized arguments: --shutdown-timeout")
        return newest(arguments)

    monkeypatch.setattr(torchrun, "parse_args", parse_as_2_11_does)
    monkeypatch.setattr(torchrun, "run", lambda parsed: started.append(torchrun.config_from_args(parsed)[0]))
    assert launch(2, ["list"]) == 0
    (config,) = started
    assert config.max_nodes == 1
    assert config.nproc_per_node == 2
    assert getattr(config, "shutdown_timeout", 30) == 30  # where this torch has the setting


@pytest.mark.slow
def test_a_launched_run_whose_time_is_over_is_not_started_again(tmp_path: Path) -> None:
    done = run(f"output={tmp_path / 'run'}", "--nproc", "2", "--max-restarts", "3", "--max-time", "1s")
    assert done.returncode == 75, done.stderr
    assert done.stderr.count("stopped by --max-time") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["stages=2", "--nproc", "3"], "3 processes for 2 stages: launch 1 to 2"),
        (["split=[3,3,3,3]", "--nproc", "2"], "add up to the model's 14 units, not 12"),
    ],
)
def test_a_wrong_launch_is_refused_in_one_line(arguments: list[str], words: str, tmp_path: Path) -> None:
    done = run(f"output={tmp_path / 'run'}", *arguments)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert words in line
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_ranks_that_disagree_are_refused_naming_the_difference(tmp_path: Path) -> None:
    output = f"output={tmp_path / 'run'}"
    done = run_ranks([output], [output, "lr=0.3"])
    assert [process.returncode for process in done] == [2, 2]
    assert "ranks disagree on the recipe: lr is 0.02 on rank 0 and 0.3 on rank 1" in done[0].stderr
    assert done[1].stderr == ""


@pytest.mark.slow
def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
        done = run(f"output={tmp_path / 'run'}", **address)
    assert done.returncode == 2
    assert f"127.0.0.1:{port} is in use: set MASTER_PORT" in done.stderr


def workers_of(launcher: int) -> dict[int, int]:
    """Process ids of a launcher's workers by rank."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            parent = int(re.findall(r"^PPid:\t(\d+)", (entry / "status").read_text(), flags=re.MULTILINE)[0])
            environment = dict(item.partition("=")[::2] for item in (entry / "environ").read_text().split("\0"))
        except (OSError, IndexError):
            continue
        if parent == launcher and "RANK" in environment:
            found[int(environment["RANK"])] = int(entry.name)
    return found


def start_three(*overrides: str) -> subprocess.Popen[str]:
    """A launcher whose three ranks are training."""
    command = [*COMMAND, "epochs=1000", "log_interval=1", *overrides, "--nproc", "3"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    launcher: subprocess.Popen[str] = subprocess.Popen(command, env=ENVIRONMENT, **pipes)
    assert launcher.stdout is not None
    assert launcher.stderr is not None
    while "epoch 1 " not in launcher.stdout.readline():
        assert launcher.poll() is None, launcher.stderr.read()
    return launcher


def gone(pids: Iterable[int]) -> bool:
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


needs_proc = pytest.mark.skipif(not Path("/proc").exists(), reason="finds the workers through /proc")


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1, 2])
def test_killing_a_worker_ends_all_others(victim: int, tmp_path: Path) -> None:
    with start_three(f"output={tmp_path / 'run'}") as launcher:
        workers = workers_of(launcher.pid)
        assert sorted(workers) == [0, 1, 2]
        os.kill(workers[victim], signal.SIGKILL)
        killed = time.monotonic()
        said = launcher.communicate(timeout=60)[1]  # at the messages' own timeout it would be later
        print(f"all processes had ended {time.monotonic() - killed:.1f} s after rank {victim} was killed")
    assert launcher.returncode == 1
    assert f"rank {victim} failed (Signal 9 (SIGKILL)" in said
    assert "Traceback" not in said
    assert gone(workers.values())


@needs_proc
@pytest.mark.slow  # a stopped process does not hear that it is to end: the launcher kills it after 30 seconds
def test_a_stage_that_hangs_is_named_with_the_message_that_is_missing(tmp_path: Path) -> None:
    long = "dataset=synthetic:10x8x60000"  # an epoch: at its end others are waited for longer
    with start_three("link_timeout=4", long, f"output={tmp_path / 'run'}") as launcher:
        assert launcher.stdout is not None
        for _ in range(20):  # beyond the first ticks, which may take long
            launcher.stdout.readline()
        workers = workers_of(launcher.pid)
        os.kill(workers[1], signal.SIGSTOP)
        said = launcher.communicate(timeout=120)[1]
    assert launcher.returncode == 1
    assert re.search(r"rank (0|2): .*stage \d \(rank \d\) .* rank (0|1|2).*: nothing within 4 s", said), said
    assert gone(workers.values())


FROZEN = """
import os, signal, sys
from petra_zoo.petra import LinkError
from petra_zoo.training import Callback, Reporter, train

class Freeze(Callback):  # on the last rank, which sees the losses
    def on_log(self, event):
        os.kill(os.getpid(), signal.SIGSTOP)

try:
    train("digits/petra_revnet_tiny", sys.argv[1:], callbacks=[Freeze()], reporter=Reporter(quiet=True))
except LinkError as error:
    print(error)
"""


@pytest.mark.slow
def test_train_gives_the_error_of_a_frozen_peer_within_the_time_of_its_links(tmp_path: Path) -> None:
    """From Python nobody ends the process: what is on its way must not hold it up for the minutes of a start."""
    settings = [*SETTINGS, "link_timeout=3", "log_interval=16", f"output={tmp_path / 'run'}"]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command, pipe = [sys.executable, "-c", FROZEN, *settings], subprocess.PIPE
    first, last = (
        subprocess.Popen(
            command,
            stdout=pipe,
            stderr=pipe,
            text=True,
            env={**ENVIRONMENT, **shared, "RANK": rank, "LOCAL_RANK": rank},
        )
        for rank in "01"
    )
    try:
        said, err = first.communicate(timeout=200)  # a start's own timeout is ten minutes
    finally:
        last.kill()
        last.communicate()
        first.kill()
    assert "nothing within 3 s" in said, err
    assert first.returncode == 0
