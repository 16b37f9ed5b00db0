"""The results of a study: one JSON file, complete after every run."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from petra_zoo.errors import UserError
from petra_zoo.files import write_whole
from petra_zoo.strict_json import Json, JsonObject, to_json


@dataclass(frozen=True)
class Trial:
    """One run of a study.

    Attributes:
        contender: what is compared, as tables call it.
        repeat: which of several: a seed, or a round.
        settings: what else decides the result.
    """

    contender: str
    repeat: int
    settings: JsonObject = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Equal where two trials are the same run, whatever order their settings are in."""
        return to_json([self.contender, self.repeat, self.settings], sort_keys=True)

    def __str__(self) -> str:
        return f"{self.contender} #{self.repeat}"


@dataclass(frozen=True)
class Record:
    """A trial and what came out of it.

    Attributes:
        contender, repeat, settings: of the trial.
        command: repeats it.
        result: measured values; `failed` alone, with the reason, where the contender broke down.
        machine, versions: it ran on.
        date: when it ended, UTC.
    """

    contender: str
    repeat: int
    settings: JsonObject
    command: str
    result: JsonObject
    machine: JsonObject = field(default_factory=dict)
    versions: JsonObject = field(default_factory=dict)
    date: str = ""

    @property
    def trial(self) -> Trial:
        """What was run."""
        return Trial(self.contender, self.repeat, self.settings)

    @property
    def failed(self) -> str | None:
        """Why there are no measured values."""
        reason = self.result.get("failed")
        return None if reason is None else str(reason)

    def number(self, name: str) -> float:
        """A measured value; NaN where there is none."""
        return _number(self.result.get(name))

    def numbers(self, name: str, column: str) -> list[float]:
        """A column of measured values, kept as lists by name; NaN for null, nothing where there is no such column."""
        columns = self.result.get(name)
        values = columns.get(column, []) if isinstance(columns, dict) else []
        return [_number(value) for value in values] if isinstance(values, list) else []


class Results:
    """What a study has found so far.

    Attributes:
        kind, study: which one; see `Study`.
        about: what tables must know beside the runs.
        runs: in the order in which they ended.
    """

    def __init__(self, kind: str, study: str, about: JsonObject | None = None) -> None:
        self.kind, self.study, self.about = kind, study, about or {}
        self._runs: dict[str, Record] = {}

    @property
    def runs(self) -> list[Record]:
        return list(self._runs.values())

    def __contains__(self, trial: Trial) -> bool:
        return trial.key in self._runs

    def find(self, trial: Trial) -> Record | None:
        """The run of a trial, where it has been done."""
        return self._runs.get(trial.key)

    def add(self, run: Record) -> None:
        """Keeps a run, in the place of an older one of the same trial."""
        self._runs[run.trial.key] = run

    @classmethod
    def read(cls, path: Path) -> Results:
        """Reads a results file.

        Raises:
            UserError: it cannot be read, or is none.
        """
        try:
            content: Json = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"results file {path} cannot be read: {error.strerror}") from error
        except (ValueError, RecursionError) as error:  # broken JSON, or not text at all
            raise UserError(f"{path} is no results file: {error}; move it away, or choose another file") from error
        try:
            return cls._of(content)
        except (TypeError, KeyError) as error:
            raise UserError(
                f"{path} is not a results file of petra-zoo bench ({error}); move it away, or choose another file"
            ) from error

    @classmethod
    def _of(cls, content: Json) -> Results:
        found = _object(content, "the file")
        results = cls(_text(found, "kind"), _text(found, "study"), _object(found.get("about", {}), "about"))
        runs = found.get("runs")
        if not isinstance(runs, list):
            raise TypeError("expected a list of runs")
        for row in runs:
            run = _object(row, "a run")
            repeat = run.get("repeat")
            if not isinstance(repeat, int):
                raise TypeError("a run without its repeat")
            parts = {name: _object(run.get(name, {}), name) for name in ("settings", "result", "machine", "versions")}
            texts = {name: _text(run, name) for name in ("contender", "command", "date")}
            results.add(Record(texts["contender"], repeat, parts["settings"], texts["command"], parts["result"],
                            parts["machine"], parts["versions"], texts["date"]))  # fmt: skip
        return results

    def to_text(self) -> str:
        """All of it as JSON, a run in a line."""
        head: JsonObject = {"study": self.study, "kind": self.kind, "about": self.about}
        lines = [f'"{name}": {to_json(value)},' for name, value in head.items()]
        runs = ",\n".join(to_json(asdict(run)) for run in self.runs)
        return "\n".join(["{", *lines, '"runs": [', runs, "]", "}"]) + "\n"

    def write(self, path: Path) -> None:
        """Writes all of it; the file is complete at any time.

        Raises:
            UserError: it cannot be written.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, self.to_text())
        except OSError as error:
            raise UserError(f"cannot write the results to {path}: {error.strerror}") from error


@contextmanager
def claimed(path: Path) -> Iterator[None]:
    """One process writes a results file at a time: two would each drop what the other adds.

    Raises:
        UserError: another one is at it, or there can be no such file.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    lock = path.with_name(f".{path.name}.lock")
    while True:
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            file = lock.open("w")
        except OSError as error:
            raise UserError(f"cannot write the results to {path}: {error.strerror}") from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(f"another petra-zoo bench is writing {path}: wait for it, or stop it") from error
            if not _is_at(file.fileno(), lock):  # whoever had it took it away between our two calls: it guards nothing
                continue
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
            return


@contextmanager
def shown_as(results: Results) -> Iterator[None]:
    """Tables and charts read results by what their kind of study measures, and anybody can change such a file.

    Raises:
        UserError: it does not hold what its kind says.
    """
    try:
        yield
    except UserError:
        raise
    except (LookupError, TypeError, ValueError, ArithmeticError) as error:
        raise UserError(
            f"the results of '{results.study}' do not hold what a study of kind '{results.kind}' measures "
            f"({type(error).__name__}: {_first_line(error)}): was the file changed by hand?"
        ) from error


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _object(value: Json, what: str) -> JsonObject:
    if not isinstance(value, dict):
        raise TypeError(f"{what} is no JSON object")
    return value


def _text(content: JsonObject, name: str) -> str:
    value = content.get(name)
    if not isinstance(value, str):
        raise TypeError(f"no text {name!r}")
    return value


def _number(value: Json) -> float:
    return float(value) if isinstance(value, int | float) else float("nan")
