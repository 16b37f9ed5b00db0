"""Runs that are disturbed, each in a folder of its own, and compared with one that was not."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from unittest.mock import patch

from torch import Tensor

from petra_zoo.bench.faulty_disk import FaultyDisk, Killed
from petra_zoo.bench.fuzzing import fuzz
from petra_zoo.checkpoints.packing import CheckpointError
from petra_zoo.checkpoints.store import CHECKPOINTS, RunCheckpoint, Store, verified
from petra_zoo.errors import Failure
from petra_zoo.petra import LinkError, Output, Pipeline
from petra_zoo.petra.messages import Down
from petra_zoo.petra.preparing import Images
from petra_zoo.petra.stage import Stage
from petra_zoo.reversible import Gradients, Streams
from petra_zoo.settings.recipe import Recipe
from petra_zoo.settings.recipe_files import make_recipe, save_recipe
from petra_zoo.settings.types import SaveInterval
from petra_zoo.strict_json import JsonObject
from petra_zoo.training import Reporter, Result, train
from petra_zoo.training.launch import as_worker
from petra_zoo.training.stopping import STOPPED, RunStopped

EVERY, TICKS, STAGES, WINDOW = 3, 16, 4, 2  # a save every so many ticks, of so many
_PATIENCE = 240.0  # seconds, on a busy machine
Work = Callable[[], Result | None]
Step = Callable[[Pipeline, Images | None, Tensor | None], Output]


@contextmanager
def laboratory() -> Iterator[Laboratory]:
    """A laboratory in a folder that is removed at the end."""
    with tempfile.TemporaryDirectory(prefix="petra-zoo-faults-") as folder:
        yield Laboratory(Path(folder), Path(_undisturbed().name))


@cache
def _undisturbed() -> tempfile.TemporaryDirectory[str]:
    """Of the run that nobody disturbs, once in a process, with which it is removed."""
    folder = tempfile.TemporaryDirectory(prefix="petra-zoo-undisturbed-")
    in_a_fork(lambda: _train(Path(folder.name)), expected=[0])
    return folder


class Laboratory:
    """Disturbs runs.

    Args:
        folder: for all of them.
        undisturbed: of a run that was not.
    """

    def __init__(self, folder: Path, undisturbed: Path) -> None:
        self.folder, self.undisturbed = folder, undisturbed

    # -- runs -----------------------------------------------------------------------------------------------------

    def kill(self, seed: int) -> JsonObject:
        """Kills one of two processes in a random tick; both are started again."""
        draw = random.Random(seed)
        tick, rank = draw.randrange(1, TICKS + 1), draw.randrange(2)
        return self._two_of_which(rank, tick, signal.SIGKILL)

    def freeze(self, seed: int) -> JsonObject:
        """Freezes one of two processes behind a save: the other ends by itself, at the next message of a tick."""
        draw = random.Random(seed)
        first = (TICKS - 1) // EVERY * EVERY - EVERY + 1  # late: until 2 J + k ticks are over, it waits for minutes
        tick, rank = draw.randrange(first, first + EVERY - 1), draw.randrange(2)
        return self._two_of_which(rank, tick, signal.SIGSTOP)

    def stop(self, seed: int) -> JsonObject:
        """Tells a run in one process to stop."""
        tick = random.Random(seed).randrange(1, TICKS)
        path = self.folder / "run"
        in_a_fork(lambda: _train(path, at(tick, lambda: os.kill(os.getpid(), signal.SIGTERM))), expected=[STOPPED])
        lost = tick - _saved(path)
        in_a_fork(lambda: _train(path), expected=[0])
        return self._told(path, lost)

    def spoil(self, seed: int, on_nonfinite: str) -> JsonObject:
        """A gradient of a random stage, of a random micro-batch, is not finite."""
        draw = random.Random(seed)
        stage, micro_batch = draw.randrange(STAGES), draw.randrange(TICKS - 1)
        path = self.folder / "run"
        expected = 1 if on_nonfinite == "stop" else 0
        in_a_fork(lambda: _train_spoilt(path, stage, micro_batch, on_nonfinite), expected=[expected])
        if on_nonfinite == "skip":
            return {"tried": 1, "survived": 1, "lost": 0}
        found = Store(path / CHECKPOINTS).newest_good()
        in_a_fork(lambda: _train(path), expected=[0])
        before = min(micro_batch + 2 * (STAGES - 1) - stage, TICKS)  # ticks that were good
        return self._told(path, before // EVERY * EVERY - (found.manifest.tick if found else 0))

    def kill_launched(self, seed: int) -> JsonObject:
        """Kills a worker of a launched run, which starts all of them again by itself."""
        draw, path, recipe = random.Random(seed), self.folder / "run", self.folder / "recipe.yaml"
        tick, rank = draw.randrange(EVERY, TICKS // 2), draw.randrange(2)
        save_recipe(_recipe(path), recipe)
        command = [sys.executable, "-m", "petra_zoo", "train", str(recipe), "--nproc", "2", "--max-restarts", "1"]
        run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        within(lambda: _saved(path) >= tick or run.poll() is not None, "a checkpoint")
        workers = children_of(run.pid)
        if run.poll() is None and len(workers) == 2:
            os.kill(workers[rank], signal.SIGKILL)
        said, _ = run.communicate(timeout=_PATIENCE)
        return self._told(path, 0) | {"went_on": "goes on from" in said, "exit_code": run.returncode}

    def _two_of_which(self, rank: int, tick: int, number: signal.Signals) -> JsonObject:
        path = self.folder / "run"
        step = at(tick, lambda: os.kill(os.getpid(), number))
        disturbed = [self._rank(path, n, port, step if n == rank else None) for port in [free_port()] for n in range(2)]
        exit_code(disturbed[1 - rank])  # ends by itself
        os.kill(disturbed[rank], signal.SIGKILL)
        exit_code(disturbed[rank])
        lost = (tick - 1) // EVERY * EVERY - _saved(path)
        again = [self._rank(path, n, port, None) for port in [free_port()] for n in range(2)]
        if codes := [code for pid in again if (code := exit_code(pid))]:
            raise Failure(f"a run that goes on ended with {codes}")
        return self._told(path, lost)

    def _rank(self, path: Path, rank: int, port: int, step: Step | None) -> int:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}

        def work() -> None:
            os.environ.update({"MASTER_ADDR": "127.0.0.1", **{key: str(x) for key, x in place.items()}})
            as_worker(lambda: _train(path, step))  # leaves at once: gloo would wait for the one that is silent

        return fork(work)

    def _told(self, path: Path, lost: int) -> JsonObject:
        model = "model.safetensors"
        same = (path / model).exists() and (path / model).read_bytes() == (self.undisturbed / model).read_bytes()
        return {"tried": 1, "survived": int(same), "lost": -(-lost // WINDOW)}

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def kill_in_a_save(self) -> JsonObject:
        """Kills a save behind each of its steps."""
        return self._saves(full=False)

    def fill_the_disk(self) -> JsonObject:
        """Lets a save fail at each of its writes."""
        return self._saves(full=True)

    def flip(self, count: int) -> JsonObject:
        """Flips random bits: in turn of every file, of its header and of what follows."""
        draw, path = random.Random(0), self._checkpoint().path
        files, found = sorted(path.iterdir()), 0
        for n in range(count):
            file = files[n % len(files)]
            content = bytearray(file.read_bytes())
            half = n // len(files) % 2
            place = draw.randrange(min(512, len(content)) if half else len(content))
            content[place] ^= 1 << draw.randrange(8)
            found += _is_detected(file, bytes(content), path)
        return {"tried": count, "survived": found}

    def _checkpoint(self) -> RunCheckpoint:
        found = Store(self.undisturbed / CHECKPOINTS).newest_good()
        if found is None:
            raise Failure("the undisturbed run has saved nothing")
        return found

    def _saves(self, *, full: bool) -> JsonObject:
        good = self._checkpoint()
        contents = {name: (good.path / name).read_bytes() for name in good.manifest.files}
        tried, survived = 0, 0
        for step in range(len(contents) + 8):
            store = Store(self.folder / "saves" / str(step))
            _save(store, good, contents, 1)
            disk = FaultyDisk(step, full=full)
            broken = Store(store.folder, disk)
            try:
                _save(broken, good, contents, 2)
            except Killed:
                pass
            except OSError:
                broken.give_up(2)
            if disk.left >= 0:  # the save came to its end before
                break
            tried += 1
            whole = all(verified(store.folder / name) for name in store.names())
            survived += whole and store.newest_good() is not None
            shutil.rmtree(store.folder)
        return {"tried": tried, "survived": survived}


def _recipe(path: Path, on_nonfinite: str = "stop") -> Recipe:
    settings: JsonObject = {
        "model": "petra_revnet_tiny",
        "dataset": "synthetic:4x8",
        "batch_size": 64,
        "workers": 0,
        "epochs": 1,
        "lr": 0.05,
        "warmup_epochs": 0,
        "stages": STAGES,
        "accumulation_steps": WINDOW,
        "model_ema": True,
        "balance": "operations",
        "link_timeout": 5.0,
        "device": "cpu",
        "on_nonfinite": on_nonfinite,
        "output": str(path),
    }
    return make_recipe(settings).model_copy(update={"checkpoint_every": SaveInterval(EVERY, "ticks")})


def _train(path: Path, step: Step | None = None, on_nonfinite: str = "stop") -> Result:
    with patch.object(Pipeline, "step", step or Pipeline.step):
        return train(_recipe(path, on_nonfinite), reporter=Reporter(quiet=True))


def _train_spoilt(path: Path, stage: int, micro_batch: int, on_nonfinite: str) -> None:
    real = Stage._finish_backward

    def finish(self: Stage, n: int, inputs: Streams, gradients: Gradients, found: dict[int, Tensor]) -> Down:
        if (self.index, n) == (stage, micro_batch):
            found = {key: d * float("nan") for key, d in found.items()}
        return real(self, n, inputs, gradients, found)

    with patch.object(Stage, "_finish_backward", finish):
        result = _train(path, on_nonfinite=on_nonfinite)
    if result.skipped != 1:
        raise Failure(f"{result.skipped} micro-batches were left out, not 1")


def _saved(path: Path) -> int:
    names = Store(path / CHECKPOINTS).names()
    return int(names[-1].split("-")[1]) if names else 0


def fuzzed(name: str, settings: JsonObject) -> JsonObject:
    """Gives a reader files from strangers."""
    count = settings["files"]
    assert isinstance(count, int)
    with tempfile.TemporaryDirectory(prefix="petra-zoo-fuzz-") as folder:
        faults = fuzz(name, Path(folder), count, seed=0)
    return {"tried": count, "faults": len(faults), "first": faults[0] if faults else None}


def _save(store: Store, good: RunCheckpoint, contents: dict[str, bytes], tick: int) -> None:
    store.begin(tick)
    entries = {name: store.write(tick, name, content) for name, content in contents.items()}
    store.publish(replace(good.manifest, tick=tick), entries)


def _is_detected(file: Path, content: bytes, checkpoint: Path) -> bool:
    before = file.read_bytes()
    file.write_bytes(content)
    try:
        verified(checkpoint)
    except CheckpointError:
        return True
    finally:
        file.write_bytes(before)
    return False


def at(tick: int, fault: Callable[[], None]) -> Step:
    """A `Pipeline.step` that first does something in one of its ticks, counted from 1."""
    real = Pipeline.step

    def step(pipeline: Pipeline, images: Images | None = None, labels: Tensor | None = None) -> Output:
        if pipeline.tick + 1 == tick:
            fault()
        return real(pipeline, images, labels)

    return step


def fork(work: Work) -> int:
    """Begins work in a process of its own, which has all that this one has imported; gives its number."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 0
    try:
        work()
    except RunStopped:
        code = STOPPED
    except (Failure, LinkError):
        code = 1
    except BaseException:
        traceback.print_exc()
        code = 3
    os._exit(code)


def in_a_fork(work: Work, expected: Sequence[int]) -> None:
    """Does work in a process of its own.

    Raises:
        Failure: it has not ended with one of the expected codes.
    """
    if (code := exit_code(fork(work))) not in expected:
        raise Failure(f"a run ended with {code}, expected {expected}")


def exit_code(pid: int) -> int:
    """Of a process that ends; of a signal its number, negative."""
    ended: list[int] = []

    def has_ended() -> bool:
        found, status = os.waitpid(pid, os.WNOHANG)
        ended.extend([os.waitstatus_to_exitcode(status)] if found else [])
        return bool(ended)

    within(has_ended, f"the end of process {pid}")
    return ended[0]


def within(done: Callable[[], bool], what: str) -> None:
    """Waits for something.

    Raises:
        Failure: it took too long.
    """
    end = time.monotonic() + _PATIENCE
    while not done():
        if time.monotonic() > end:
            raise Failure(f"waited {_PATIENCE:g} s for {what}")
        time.sleep(0.02)


def children_of(pid: int) -> list[int]:
    """The processes that a process has started, where the system tells."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def free_port() -> int:
    """A port that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
