"""The benchmark of one GPU: every section runs on the CPU with tiny sizes."""

import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from petra_zoo.bench.gpu import study
from petra_zoo.bench.gpu.device import peak_bytes
from petra_zoo.bench.gpu.kernels import Kernels
from petra_zoo.bench.gpu.stand_ins import host_time, live_mib, moved_gib, operations_of_a_tick
from petra_zoo.bench.gpu.steps import StepCase, TrainingStep
from petra_zoo.bench.gpu.study import GpuStudy
from petra_zoo.bench.gpu.tables import gpu_tables
from petra_zoo.bench.gpu.ticks import TickCase, covered, measure_side_by_side, measure_tick
from petra_zoo.bench.gpu.ways import CHECKPOINTED, PLAIN, Network, find_way, our_ways
from petra_zoo.bench.results import Record, Results
from petra_zoo.reversible.rectified import merge_rectified

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
CPU = torch.device("cpu")
RESNET, VIT = GpuStudy.small().steps


def run_script(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--quick", *arguments])
    runpy.run_path(str(SCRIPT), run_name="__main__")


def step(name: str, case: StepCase, batch: int = 2) -> TrainingStep:
    found = TrainingStep(find_way(name), case, CPU, None)
    found.feed(batch)
    return found


@pytest.mark.parametrize("case", [RESNET, VIT], ids=["resnet", "vit"])
def test_ways_to_save_memory_compute_the_loss_of_the_network_that_they_save(case: StepCase) -> None:
    timms = [PLAIN, CHECKPOINTED, "timm, selective checkpointing", "timm, saved tensors on the host"]
    assert len({float(step(name, case)()) for name in timms}) == 1
    losses = [float(step(name, case)()) for name in our_ways()]
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-2)  # streams are narrow or wide
    assert losses[0] == losses[1]


def test_checkpointing_and_reversibility_hold_less() -> None:
    names = [PLAIN, CHECKPOINTED, "timm, selective checkpointing", our_ways()[0]]
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


def test_a_tick_is_measured() -> None:
    found = measure_tick(TickCase("petra_revnet_tiny", 8, 2, "petra", rounds=1), CPU)
    assert {"tick_ms", "host_ms", "peak_mib"} <= found.keys()


@pytest.mark.slow
def test_petra_is_measured_beside_backpropagation() -> None:
    found = measure_side_by_side("petra_revnet_tiny", 8, 2, 1, CPU)
    assert {"backprop_tick_ms", "side_by_side_tick_over_backprop", "one_stream_peak_mib"} <= found.keys()


@pytest.mark.slow
def test_operations_of_a_tick_are_counted() -> None:
    found = operations_of_a_tick("petra_revnet_tiny", ["reversible", "backprop"], image=8)
    assert found["reversible"] > found["backprop"] > 100  # what is not kept is computed again


@pytest.mark.slow
def test_live_bytes_of_a_step_are_counted_in_every_way() -> None:
    found = live_mib(RESNET.network)
    images = 3 * 32 * 32 * 4 / 2**20
    assert all(found[way] > images for way in ("timm", "checkpointed", "plain", "reversible"))


@pytest.mark.slow
def test_a_reversible_step_moves_hardly_more_bytes_than_a_checkpointed_one() -> None:
    found = moved_gib(Network("resnet50", image=64, classes=10), batch=64)
    assert found["timm"] < found["plain"] < found["checkpointed"]
    assert found["reversible_over_checkpointed"] < 1.01


def test_a_fused_function_is_one_kernel_that_reads_and_writes_once() -> None:
    b, a = torch.randn(2, 8, 5, 5, device="meta"), torch.randn(2, 8, 5, 5, device="meta")
    with Kernels() as kernels:
        mean = merge_rectified(b, a)
        mean.relu_()
    assert kernels.operations == 2
    assert kernels.moved == 3 * b.nbytes + 2 * b.nbytes


def test_host_time_is_told_over_timms() -> None:
    assert host_time(RESNET.network, rounds=1).keys() == {
        "plain_over_timm",
        "reversible_over_timm",
        "checkpointed_over_timm",
    }


def test_tables_compare_with_timm_and_with_checkpointing() -> None:
    results = Results("gpu", "gpu")
    for name, ms, mib in ((PLAIN, 10.0, 40.0), (CHECKPOINTED, 20.0, 16.0), ("petra-zoo, reversible", 15.0, 12.0)):
        result = {"captured_ms": ms, "captured_over_plain": ms / 10, "captured_over_checkpointed": ms / 20,
                  "mib_per_image": mib, "largest_batch": 4}  # fmt: skip
        results.add(Record(name, 0, {"section": "step", "network": "resnet50"}, "", result))
    row = gpu_tables(results)["step"].splitlines()[-1]
    assert row == "| resnet50 | petra-zoo, reversible | 15.0 | 1.50 | 0.75 | 12.0 | 0.30 | 0.75 | - | - | 4 |"


def test_time_in_which_something_runs_counts_once() -> None:
    assert covered([(0, 2), (1, 3), (1, 2), (5, 6)]) == 4
    assert covered([]) == 0


@pytest.mark.slow
@pytest.mark.timeout(600)
# The compiler looks at what a cast has made of a leaf; in a user's run that is a warning of torch's own, said once.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_all_sections_run_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.json"
    sections = ("facts", "step", "tick", "side_by_side", "cpu")
    run_script(monkeypatch, *sections, "--json", str(path))
    results = Results.read(path)
    assert not [(run.trial, run.failed) for run in results.runs if run.failed]
    assert len(results.runs) == len(replace(GpuStudy.small(), sections=sections).trials(results))
