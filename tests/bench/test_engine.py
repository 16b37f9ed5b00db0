"""The engine of studies: order, resuming, what is kept, and what ends it."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from petra_zoo.bench.engine import run_study
from petra_zoo.bench.results import Results, claimed
from petra_zoo.errors import Failure, UserError
from tests.bench.toy import Toy


@pytest.fixture
def toy(tmp_path: Path) -> Toy:
    return Toy(tmp_path / "log")


def runs_of(toy: Toy) -> list[str]:
    """What was run, in the order in which it began."""
    lines = toy.log.read_text().splitlines() if toy.log.exists() else []
    return [line.partition(" by")[0] for line in lines if "#" in line]


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def said(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Toy, Path, str]:
    """A study that has run, its results file, and what it said."""
    folder, console = tmp_path_factory.mktemp("finished"), quiet()
    toy, path = Toy(folder / "log"), folder / "new" / "results.json"
    run_study(toy, path, console=console)
    return toy, path, said(console)


@pytest.fixture
def path(finished: tuple[Toy, Path, str], tmp_path: Path) -> Path:
    """A results file of one's own, complete."""
    return Path(shutil.copy(finished[1], tmp_path))


def test_contenders_take_turns_and_results_are_kept(finished: tuple[Toy, Path, str]) -> None:
    toy, path, printed = finished
    assert runs_of(toy) == ["one #0", "three #0", "one #1", "three #1"]
    run = Results.read(path).runs[1]
    assert run.result == {"letters": 5, "threads": "1"}
    assert run.command == "count the letters of three"
    assert {"python", "torch", "timm", "petra-zoo"} <= run.versions.keys()
    assert {"processor", "cores", "system", "jobs"} <= run.machine.keys()
    assert [file.name for file in path.parent.iterdir()] == ["results.json"]
    assert "2/4  three #0: letters 5" in printed


def test_what_is_done_is_not_repeated(toy: Toy, path: Path) -> None:
    content = json.loads(path.read_text())
    del content["runs"][1]
    path.write_text(json.dumps(content))
    results = run_study(Toy(toy.log, repeats=3), path, console=quiet())
    assert runs_of(toy) == ["three #0", "one #2", "three #2"]
    assert len(results.runs) == 6


def test_a_complete_study_starts_no_worker_and_says_so(toy: Toy, path: Path) -> None:
    console = quiet()
    before = path.read_text()
    run_study(toy, path, console=console)
    assert f"toy: 4 of 4 runs are in {path}" in said(console)
    assert not toy.log.exists()
    assert path.read_text() == before


def test_other_settings_are_another_run(toy: Toy, path: Path) -> None:
    results = run_study(Toy(toy.log, ("one",), 1, settings="new"), path, console=quiet())
    assert [run.settings for run in results.runs] == [{"as": "as ever"}] * 4 + [{"as": "new"}]


def test_two_jobs_are_two_processes(toy: Toy, tmp_path: Path) -> None:
    run_study(Toy(toy.log, repeats=8), tmp_path / "results.json", jobs=2, console=quiet())
    lines = toy.log.read_text().splitlines()
    assert len({line.partition("by ")[2] for line in lines if "#" in line}) == 2
    assert lines.count("closed") == 2


def test_a_contender_that_breaks_down_is_a_result(toy: Toy, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    run_study(Toy(toy.log, ("diverges", "one"), 1), path, console=quiet())
    assert [run.failed for run in Results.read(path).runs] == ["the loss is infinite", None]


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("mistaken", UserError, "mistaken #0: there is no such thing"),
        ("broken", Failure, "broken #0: ZeroDivisionError: a mistake of ours"),
        ("dies", Failure, "dies #0: the worker process died"),
    ],
)
def test_what_cannot_go_on_is_said_in_one_line(
    toy: Toy, tmp_path: Path, name: str, kind: type[Exception], words: str
) -> None:
    path = tmp_path / "results.json"
    with pytest.raises(kind, match=words) as raised:
        run_study(Toy(toy.log, ("one", name, "three"), 1), path, console=quiet())
    assert "\n" not in str(raised.value)
    assert [run.contender for run in Results.read(path).runs] == ["one"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"study": "toy", ', "is no results file: Expecting"),
        ("[]", "not a results file of petra-zoo bench"),
        ('{"study": "toy", "kind": "toy", "runs": [{"contender": "one"}]}', "a run without its repeat"),
        ('{"study": "mine", "kind": "toy", "runs": []}', "holds the study 'mine'"),
    ],
)
def test_a_file_of_something_else_is_refused_and_stays(toy: Toy, tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(content)
    with pytest.raises(UserError, match=words):
        run_study(toy, path, console=quiet())
    assert path.read_text() == content
    assert not runs_of(toy)


def test_two_benches_do_not_write_one_file(toy: Toy, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    with claimed(path), pytest.raises(UserError, match="another petra-zoo bench is writing"):
        run_study(toy, path, console=quiet())


def test_a_lock_that_was_taken_away_meanwhile_guards_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bench before leaves between this one's opening of the lock file and its lock."""
    fcntl = pytest.importorskip("fcntl")
    path, real, left = tmp_path / "results.json", fcntl.flock, []

    def flock(*arguments: Any) -> None:
        if not left:
            left.append(True)
            path.with_name(".results.json.lock").unlink()
        real(*arguments)

    monkeypatch.setattr(fcntl, "flock", flock)
    with claimed(path), pytest.raises(UserError, match="another petra-zoo bench is writing"), claimed(path):
        pass
    assert not path.with_name(".results.json.lock").exists()


def test_a_study_of_times_takes_one_job(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Toy, "shares_the_machine", False)
    with pytest.raises(UserError, match="use jobs=1"):
        run_study(toy, tmp_path / "results.json", jobs=2, console=quiet())


def start_endless(toy: Toy, path: Path) -> subprocess.Popen[str]:
    """A process that studies `toy`, in a group of its own, in the middle of a run that does not end."""
    code = (  # a shell has what it starts in the background ignore the signal, and so would this
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from pathlib import Path; from tests.bench.toy import Toy; from petra_zoo.bench.engine import run_study\n"
        f"if __name__ == '__main__': run_study(Toy(Path({str(toy.log)!r}), ('one', 'endless'), 1), Path({str(path)!r}))"
    )
    script = path.with_name("script.py")
    script.write_text(code)
    root = str(Path(__file__).parents[2])
    process = subprocess.Popen(
        [sys.executable, str(script)],
        env=os.environ | {"PYTHONPATH": root},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,  # a group of its own, which gets the signal as a terminal's does
    )
    while "endless #0" not in runs_of(toy):
        assert process.poll() is None
        time.sleep(0.05)
    return process


def test_ctrl_c_keeps_what_is_done_and_ends_the_workers(toy: Toy, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    process = start_endless(toy, path)
    os.killpg(process.pid, signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    assert f"interrupted: 1 of 2 runs are in {path}" in printed
    assert [run.contender for run in Results.read(path).runs] == ["one"]
    assert toy.log.read_text().splitlines()[-1] == "closed"
    while someone_left(process.pid):  # else the test's own time limit ends it
        time.sleep(0.05)


@pytest.mark.timeout(60)  # the run itself goes on for longer
def test_a_worker_does_not_outlive_a_bench_that_is_killed(toy: Toy, tmp_path: Path) -> None:
    process = start_endless(toy, tmp_path / "results.json")
    process.kill()
    process.communicate()
    while someone_left(process.pid):
        time.sleep(0.05)
    assert toy.log.read_text().splitlines()[-1] == "closed"


def someone_left(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
