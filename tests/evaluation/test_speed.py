"""How fast a network answers, as the command measures it."""

import json
from pathlib import Path

import pytest

from petra_zoo.errors import UserError
from petra_zoo.evaluation import speed as speed_module
from petra_zoo.evaluation.speed import TimingOptions, time_inference
from tests.cli.test_main import petra_zoo
from tests.hub.saved_models import save


def test_every_batch_size_is_timed_as_often_as_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(10**6))
    monkeypatch.setattr(speed_module.time, "perf_counter", lambda: float(next(ticks)))
    options = TimingOptions(batch_sizes=(1, 4), image_size=(8, 8), device="cpu", repeats=2)
    one, four = time_inference("petra_revnet_tiny", options)
    assert (one.batch_size, four.batch_size) == (1, 4)
    assert (four.milliseconds, four.fastest, four.slowest) == (1000.0, 1000.0, 1000.0)
    assert four.images_per_second == 4 * one.images_per_second == 4.0


def test_the_command_says_what_it_measured(tmp_path: Path) -> None:
    save(tmp_path / "model")
    options = ["--batch-size", "2", "--repeats", "1", "--device", "cpu"]
    done = petra_zoo("speed", tmp_path / "model", "petra_revnet_tiny", *options, "--input-size", "8", "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert [(row["model"], row["way"], row["batch_size"]) for row in said["speeds"]] == [
        (str(tmp_path / "model"), "eager", 2),
        ("petra_revnet_tiny", "eager", 2),
    ]
    assert all(0 < row["fastest"] <= row["milliseconds"] <= row["slowest"] for row in said["speeds"])
    assert said["machine"]["threads"] > 0
    assert "\nmodel\tway" not in done.stdout


@pytest.mark.slow
def test_every_way_is_timed() -> None:
    pytest.importorskip("onnxscript")
    options = TimingOptions(
        ways=speed_module.INFERENCE_WAYS, batch_sizes=(2,), image_size=(8, 8), device="cpu", repeats=1
    )
    assert [row.way for row in time_inference("petra_revnet_tiny", options)] == ["eager", "compiled", "onnx"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--way", "tensorrt"], "--way tensorrt: expected eager, compiled, onnx"),
        (["--way", "onnx", "--amp"], "measured on the CPU in float32"),
        (["--input-size", "2"], "too small"),
    ],
)
def test_what_cannot_be_measured_is_one_line(arguments: list[str], said: str) -> None:
    done = petra_zoo("speed", "petra_revnet_tiny", "--device", "cpu", *arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


def test_all_names_are_looked_at_before_the_first_is_timed() -> None:
    done = petra_zoo("speed", "petra_revnet_tiny", "petra_revnet_tini")
    assert (done.returncode, done.stdout) == (2, "")
    assert "petra_revnet_tini" in done.stderr


def test_a_model_that_does_not_exist_is_named() -> None:
    with pytest.raises(UserError, match="petra_revnet_tini"):
        time_inference("petra_revnet_tini")


def test_a_batch_that_does_not_fit_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    monkeypatch.setattr(speed_module, "_call", lambda *_: full)
    with pytest.raises(
        UserError, match=r"^out of memory with a batch size of 4 \(eager\): use a smaller --batch-size$"
    ):
        time_inference("petra_revnet_tiny", TimingOptions(batch_sizes=(4,), image_size=(8, 8), device="cpu"))
