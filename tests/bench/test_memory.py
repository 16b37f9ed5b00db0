"""The study of memory against depth."""

from pathlib import Path

import pytest

from petra_zoo.bench import memory, steps
from petra_zoo.bench.memory import MemoryStudy, memory_charts, memory_tables
from petra_zoo.bench.memory_transformers import (
    CHECKPOINTED,
    IN_PARTS,
    PLAIN,
    TransformerStep,
    measured_step,
)
from petra_zoo.bench.results import Record, Results
from petra_zoo.bench.study import Study

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run_all(study: Study) -> Results:
    """The results of all runs, done in this process."""
    results = Results(study.kind, study.name)
    for trial in study.trials(results):
        results.add(Record(trial.contender, trial.repeat, trial.settings, study.command(trial), study.run(trial)))
    return results


def test_blocks_that_store_activations_add_more_bytes_than_reversible_ones() -> None:
    results = run_all(MemoryStudy.small())
    lines = memory_tables(results)["depth"].splitlines()
    assert lines[0] == "| family | contender | 2 blocks | 4 blocks | each further block |"
    (chart,) = memory_charts(results).values()
    points = {series.label: [point.y for point in series.points] for panel in chart.panels for series in panel.series}
    grown = {name: deep - shallow for name, (shallow, deep) in points.items()}
    assert grown["petra-zoo"] < grown["plain"]
    assert grown["petra-zoo reversible"] < grown["petra-zoo plain"]


def test_contenders_whose_library_is_missing_are_left_out_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "LIBRARIES", ("plain", "no_such_library"))
    monkeypatch.setattr(memory, "FAMILY", {"no_such_library": "streams", "petra-zoo": "streams"})
    study = MemoryStudy(depths=(2,), transformers=())
    assert [trial.contender for trial in study.trials(Results("memory", "memory"))] == ["petra-zoo"]
    assert "no_such_library" in steps.left_out()[0]


LARGE = [TransformerStep("vit_large_patch16_224", 224, way) for way in (PLAIN, CHECKPOINTED, IN_PARTS)]


def keeps_the_promise(plain: float, checkpointed: float, reversible: float) -> bool:
    return reversible <= 0.4 * checkpointed and reversible <= plain / 12


def test_the_committed_results_say_that_a_large_transformer_needs_two_fifths_of_checkpointing() -> None:
    results = Results.read(BENCHMARKS / "memory" / "results.json")
    runs = [results.find(step.trial) for step in LARGE]
    assert keeps_the_promise(*(run.number("peak") for run in runs if run is not None))


@pytest.mark.slow
def test_a_large_transformer_needs_two_fifths_of_checkpointing() -> None:
    peaks = [measured_step(step)["peak"] for step in LARGE]
    assert keeps_the_promise(*(float(str(peak)) for peak in peaks))
