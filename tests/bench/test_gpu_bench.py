"""The benchmark of one GPU: every section runs on the CPU with tiny sizes."""

import runpy
import sys
from pathlib import Path

import pytest
import torch

from petra_zoo.bench.gpu import study
from petra_zoo.bench.gpu.contenders import CHECKPOINTED, PLAIN, find_contender, our_contenders
from petra_zoo.bench.gpu.device import peak_bytes
from petra_zoo.bench.gpu.steps import StepCase, TrainingStep
from petra_zoo.bench.gpu.study import GpuStudy
from petra_zoo.bench.gpu.ticks import TickCase, covered, measure_tick
from petra_zoo.bench.results import Results

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
CPU = torch.device("cpu")
RESNET, VIT = GpuStudy.small().steps


def run_script(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--quick", *arguments])
    runpy.run_path(str(SCRIPT), run_name="__main__")


def step(name: str, case: StepCase, batch: int = 2) -> TrainingStep:
    found = TrainingStep(find_contender(name), case, CPU, None)
    found.feed(batch)
    return found


@pytest.mark.parametrize("case", [RESNET, VIT], ids=["resnet", "vit"])
def test_ways_to_save_memory_compute_the_loss_of_the_network_that_they_save(case: StepCase) -> None:
    timms = [PLAIN, CHECKPOINTED, "timm, selective checkpointing", "timm, saved tensors on the host"]
    assert len({float(step(name, case)()) for name in timms}) == 1
    assert len({float(step(name, case)()) for name in our_contenders()[:2]}) == 1


def test_checkpointing_and_reversibility_hold_less() -> None:
    names = [PLAIN, CHECKPOINTED, "timm, selective checkpointing", our_contenders()[0]]
    plain, *savers = [peak_bytes(step(name, VIT, batch=32), CPU) for name in names]
    assert all(peak < plain for peak in savers)


def test_a_case_that_breaks_down_is_kept_with_its_reason_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "facts", lambda: 1 / 0)
    monkeypatch.setattr(study, "gpu_tests", lambda: {"rc": 0})
    path = tmp_path / "results.json"
    run_script(monkeypatch, "facts", "tests", "--json", str(path))
    broken, fine = Results.read(path).runs
    assert broken.failed == "ZeroDivisionError: division by zero"
    assert fine.result == {"rc": 0}


def test_the_script_does_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.json"
    for _ in range(2):
        run_script(monkeypatch, "facts", "--json", str(path))
    assert [run.contender for run in Results.read(path).runs] == ["facts"]


@pytest.mark.parametrize("method", ["petra", "backprop"])
def test_ticks_are_measured(method: str) -> None:
    found = measure_tick(TickCase("petra_revnet_tiny", 8, 2, method, rounds=1), CPU)
    assert {"tick_ms", "host_ms", "peak_mib"} <= found.keys()


def test_time_in_which_something_runs_counts_once() -> None:
    assert covered([(0, 2), (1, 3), (1, 2), (5, 6)]) == 4
    assert covered([]) == 0


@pytest.mark.slow
def test_all_sections_run_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.json"
    run_script(monkeypatch, "facts", "step", "tick", "--json", str(path))
    results = Results.read(path)
    assert not [(run.trial, run.failed) for run in results.runs if run.failed]
    assert len(results.runs) == sum(t.settings["section"] != "tests" for t in GpuStudy.small().trials(results))
