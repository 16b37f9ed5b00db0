"""The command line as a user meets it: a process, its output, its exit code."""

import contextlib
import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from petra_zoo.cli.main import run

QUICK = ["dataset=synthetic:4x8x128", "batch_size=32", "epochs=1", "workers=0", "img_size=8", "warmup_epochs=0"]


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def petra_zoo(*arguments: object) -> Done:
    """The command line in this process: importing torch anew for every command would take most of the time."""
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            run([str(argument) for argument in arguments])
        except SystemExit as leaving:
            code = int(leaving.code or 0)
    return Done(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "my run"
    done = petra_zoo("train", "digits/petra_revnet_tiny", *QUICK, f"output={path}")
    assert done.returncode == 0, done.stderr
    assert f"saved {path}" in done.stdout
    assert f"next: petra-zoo evaluate '{path}'" in done.stdout
    return path


def test_evaluate_tells_accuracy_loss_and_the_worst_classes(run_directory: Path) -> None:
    done = petra_zoo("evaluate", run_directory)
    assert done.returncode == 0, done.stderr
    for word in ("top-1", "loss", "worst", "synthetic:4x8x128"):
        assert word in done.stdout
    assert "top-5" not in done.stdout  # of four classes


def test_evaluate_tells_top_5_where_there_are_more_classes() -> None:
    done = petra_zoo("evaluate", "petra_revnet_tiny.digits", "--dataset", "digits")
    assert "  top-5  " in done.stdout


def test_evaluate_writes_json_and_timms_results_csv(run_directory: Path, tmp_path: Path) -> None:
    results = tmp_path / "results.csv"
    done = petra_zoo("evaluate", run_directory, "--dataset", "synthetic:4x8x128", "--json", "--results-file", results)
    report = json.loads(done.stdout)
    assert {"top1", "top5", "loss", "images", "worst_classes"} <= report.keys()
    with results.open() as file:
        (row,) = csv.DictReader(file)
    columns = "model,top1,top1_err,top5,top5_err,param_count,img_size,crop_pct,interpolation,peak_memory_mib,dataset"
    assert list(row) == columns.split(",")
    assert float(row["top1"]) == pytest.approx(report["top1"], abs=1e-3)


def test_list_gives_one_name_a_line_in_a_pipe() -> None:
    names = petra_zoo("list", "*_cifar").stdout.split()
    assert "petra_revnet18_cifar" in names
    assert all(name.startswith("petra_") and name.endswith("_cifar") for name in names)


def test_list_and_info_as_json() -> None:
    (row,) = json.loads(petra_zoo("list", "petra_revnet_tiny", "--json").stdout)
    info = json.loads(petra_zoo("info", "petra_revnet_tiny", "--json").stdout)
    assert row.items() <= info.items()
    memory = info["activation_bytes_per_image"]
    assert 0 < memory["reversible"] < memory["plain"]
    assert isinstance(info["pretrained"], list)
    assert row["units"] == 14
    assert row["runs"] == [3, 2, 2, 2]


def test_info_is_readable() -> None:
    text = petra_zoo("info", "petra_revnet50").stdout
    assert "25,557,032" in text
    assert "18, of them 12 reversible" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "digits/petra_revnet_tinny"], "digits/petra_revnet_tiny"),
        (["train", "digits/petra_revnet_tiny", "epoch=3"], "did you mean 'epochs'"),
        (["train", "digits/petra_revnet_tiny", "epochs=three"], "epochs='three'"),
        (["train", "digits/petra_revnet_tiny", "stages=15", "batch_size=32"], "choose 1 to 14"),
        (["evaluate", "no/such/run"], "there is no run directory"),
        (["evaluate", "petra_revnet18"], "--dataset"),
        (["evaluate", "petra_revnet18_cifar", "--dataset", "digits"], "No pretrained weights exist"),
        (["info", "petra_revnet51"], "petra_revnet50"),
        (["list", "nothing*"], "no model matches"),
        (["recipes", "show", "digit/petra"], "digits/petra_revnet_tiny"),
        (["trian"], "No such command 'trian'"),
        (["evaluate", "petra_revnet_tiny.digits", "--dataset", "digits", "--device", "gpu"], "device=gpu: there is no"),
        (["plan", "petra_revnet_tiny", "--device", "gpu"], "device=gpu: there is no such device; expected cpu"),
        (["predict", "x.png", "--device", "gpu"], "device=gpu: there is no such device; expected cpu"),
        (["predict", "x.png", "--device", "cpu:1"], "device=cpu:1: there are 1 such devices here"),
        (["predict", "x.png", "--device", "meta"], "device=meta: torch sees no meta device here; use device="),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_bad_use_is_one_clear_line_and_exit_code_2(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = petra_zoo(*arguments)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_process_ends_with_the_code_and_without_a_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "petra_zoo", "info", "petra_revnet51"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert done.stderr.startswith("petra-zoo: model 'petra_revnet51' is unknown")
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_ctrl_c_ends_a_run_that_goes_on_later(tmp_path: Path) -> None:
    path = tmp_path / "run"
    settings = [*QUICK[:1], *QUICK[3:], "epochs=1000", "batch_size=64", f"output={path}"]
    command = [sys.executable, "-m", "petra_zoo", "train", "digits/petra_revnet_tiny", *settings]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    deadline = time.monotonic() + 90
    while not (path / "model.safetensors").exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 75, err
    assert f"stopped by SIGINT: {path} is saved; the same command goes on from there" in err
    assert "Traceback" not in err
    assert petra_zoo("evaluate", path).returncode == 0


@pytest.mark.parametrize("raised", ["KeyboardInterrupt", "ImportError"])
@pytest.mark.parametrize("module", [True, False], ids=["module", "script"])
def test_ctrl_c_within_the_imports_is_one_line(tmp_path: Path, raised: str, module: bool) -> None:
    """A library that is interrupted while it is imported, or makes an ImportError of that."""
    text = "try:\n    raise KeyboardInterrupt\nexcept KeyboardInterrupt as error:\n    raise " + raised
    (tmp_path / "torch.py").write_text(text)
    (tmp_path / "petra-zoo").write_text("from petra_zoo.cli.main import run\nrun()\n")
    command = [sys.executable, *(["-m", "petra_zoo"] if module else [tmp_path / "petra-zoo"]), "list"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment)
    assert done.stderr == "petra-zoo: interrupted\n"
    assert done.returncode == (-signal.SIGINT if raised == "KeyboardInterrupt" else 1)


def test_an_interrupted_import_in_someone_elses_program_is_its_own_affair(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", "import petra_zoo.models"], capture_output=True, text=True, timeout=100, env=environment
    )
    assert "Traceback" in done.stderr


def test_a_home_is_expanded_in_options_and_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    done = petra_zoo("plan", "petra_revnet_tiny", "--profile=~/none.json")
    assert f"cannot read the profile {tmp_path}/home/none.json" in done.stderr
    done = petra_zoo("train", "digits/petra_revnet_tiny", "dataset=folder", "data_dir=~/data", "output=~/run")
    assert f"{tmp_path}/home/data" in done.stderr
    assert not (tmp_path / "~").exists()


def test_a_module_to_import_that_is_not_there_is_one_line() -> None:
    done = petra_zoo("--import", "mine.nowhere", "list")
    assert done.returncode == 2
    assert done.stderr.startswith("petra-zoo: --import mine.nowhere: there is no module mine, neither installed nor")


def test_the_ranks_import_what_the_command_line_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[tuple[int, list[str], int]] = []
    monkeypatch.setattr("petra_zoo.training.launch.launch", lambda *given: launched.append(given) or 0)
    monkeypatch.setattr("petra_zoo.extensions._imported", [])
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mine_for_ranks.py").write_text("")
    done = petra_zoo("--import", "mine_for_ranks", "train", "digits/petra_revnet_tiny", "stages=2", "--nproc", 2)
    assert done.returncode == 0, done.stderr
    ((processes, command, *_),) = launched
    assert (processes, command[:4]) == (2, ["--import", "mine_for_ranks", "train", "digits/petra_revnet_tiny"])


def test_help_names_every_command() -> None:
    text = petra_zoo("--help").stdout
    for command in ("demo", "train", "evaluate", "list", "info", "recipes"):
        assert command in text


@pytest.mark.timeout(110)
def test_the_demo_trains_evaluates_shows_digits_and_says_what_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = petra_zoo("demo", "epochs=2")
    assert done.returncode == 0, done.stderr
    assert "4 stages" in done.stdout
    assert "top-1" in done.stdout
    assert "@@" in done.stdout  # a digit, drawn
    assert "try next" in done.stdout
