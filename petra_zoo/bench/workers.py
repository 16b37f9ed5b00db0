"""Worker processes that do the runs of a study: one thread each, one run after the other.

A worker lives as long as the study: torch is imported once, and pictures are drawn once. It ignores Ctrl-C, which a
terminal sends to all processes; the parent ends it, and so does the parent's death.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from types import TracebackType
from typing import Self

from petra_zoo.bench.results import Record
from petra_zoo.bench.study import Study, Trial
from petra_zoo.errors import Failure, UserError
from petra_zoo.extensions import import_modules, imported_modules
from petra_zoo.machine import describe_machine, describe_versions, now
from petra_zoo.strict_json import JsonObject

_SECONDS_TO_END = 30.0  # before a worker that was asked to end is killed: torch takes its time on a busy machine
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # read when torch is imported


@dataclass(frozen=True)
class _Outcome:
    """What a worker says of a run: what was measured, or what went wrong."""

    result: JsonObject | None = None
    machine: JsonObject | None = None
    mistake: str | None = None  # of the user's
    crash: str | None = None  # a traceback


class Workers:
    """The processes that work on a study, started when there is something to do.

    Args:
        study: which runs they do.
        jobs: how many there are at most.
    """

    def __init__(self, study: Study, jobs: int) -> None:
        self.study, self.jobs = study, jobs
        self._workers: list[_Worker] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for worker in self._workers:
            worker.ask_to_end(now=error is not None)
        for worker in self._workers:
            worker.end()

    @property
    def in_flight(self) -> list[Trial]:
        """What is being worked on."""
        return [worker.trial for worker in self._workers if worker.trial is not None]

    @property
    def free(self) -> int:
        """How many more runs can be started."""
        return self.jobs - len(self.in_flight)

    def start(self, trial: Trial) -> None:
        """Lets a free worker begin with a run."""
        worker = next((worker for worker in self._workers if worker.trial is None), None)
        if worker is None:
            worker = _Worker(self.study)
            self._workers.append(worker)
        worker.start(trial)

    def wait(self) -> Record:
        """Waits for the next run that ends.

        Raises:
            UserError: the study cannot go on.
            Failure: a worker died, or a run raised what nobody expected; its traceback is the cause.
        """
        busy = {worker.connection: worker for worker in self._workers if worker.trial is not None}
        ready = wait(list(busy))[0]
        worker = next(worker for connection, worker in busy.items() if connection is ready)
        trial = worker.trial
        assert trial is not None
        outcome = worker.outcome()
        if outcome.mistake is not None:
            raise UserError(f"{self.study.title(trial)}: {outcome.mistake}")
        if outcome.crash is not None:
            last = outcome.crash.strip().splitlines()[-1]
            raise Failure(f"{self.study.title(trial)}: {last}") from RuntimeError(f"in a worker:\n{outcome.crash}")
        assert outcome.result is not None
        return Record(
            trial.contender,
            trial.repeat,
            trial.settings,
            command=self.study.command(trial),
            result=outcome.result,
            machine={**(outcome.machine or {}), "jobs": self.jobs},
            versions=describe_versions(),
            date=now(),
        )


class _Worker:
    """One process, seen from the parent; `trial` is what it works on."""

    def __init__(self, study: Study) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.trial: Trial | None = None
        # No daemon: a run may have processes of its own.
        self._process: SpawnProcess = context.Process(target=_serve, args=(study, theirs, imported_modules()))
        with _environment(_ONE_THREAD):
            self._process.start()
        theirs.close()  # so that the parent's end sees when the worker dies

    def start(self, trial: Trial) -> None:
        self.trial = trial
        try:
            self.connection.send(trial)
        except OSError:  # it has died; `outcome` says so
            pass

    def outcome(self) -> _Outcome:
        try:
            outcome: _Outcome = self.connection.recv()
        except (EOFError, OSError) as error:
            self._process.join(_SECONDS_TO_END)
            raise Failure(f"{self.trial}: the worker process died ({_how(self._process.exitcode)})") from error
        self.trial = None
        return outcome

    def ask_to_end(self, *, now: bool) -> None:
        if now or self.trial is not None:
            self._process.terminate()
            return
        try:
            self.connection.send(None)
        except OSError:
            pass

    def end(self) -> None:
        self._process.join(_SECONDS_TO_END)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self.connection.close()


def _serve(study: Study, connection: Connection, modules: list[str]) -> None:
    """A worker's life: until it is told to end, or nobody is there to listen."""
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what is open is closed
    try:
        import_modules(modules)
        while (trial := connection.recv()) is not None:
            connection.send(_outcome(study, trial))
    except (EOFError, OSError):
        pass
    finally:
        study.close()


def _outcome(study: Study, trial: Trial) -> _Outcome:
    try:
        result = study.run(trial)
    except UserError as error:
        return _Outcome(mistake=str(error))
    except Failure as error:
        result = {"failed": str(error)}
    except Exception:
        return _Outcome(crash=traceback.format_exc())
    return _Outcome(result, describe_machine())


def end_with_parent() -> None:
    """Ends this process as soon as the one that started it is gone, in the middle of a run too; as SIGTERM does."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait_for_it() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait_for_it, daemon=True).start()


def _how(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        return f"{signal.Signals(-exitcode).name}; out of memory?" if exitcode == -9 else signal.Signals(-exitcode).name
    return f"exit code {exitcode}"


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Sets variables for the processes that are started within."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
