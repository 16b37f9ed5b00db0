"""The study of faults: each kind once, and what its tables say."""

from pathlib import Path

import pytest

from petra_zoo.bench.faults import FAULTS, FUZZED, FaultStudy, faults_tables
from petra_zoo.bench.fuzzing import READERS, fuzz
from petra_zoo.bench.results import Record, Results, Trial


def test_tables_add_up_what_was_injected_and_survived() -> None:
    results = Results("faults", "faults")
    for seed, survived in ((0, 1), (1, 0)):
        results.add(Record("killed", seed, {}, "", {"tried": 1, "survived": survived, "lost": 0}))
    results.add(Record("fuzzed npz", 0, {"files": 5}, "", {"tried": 5, "faults": 1, "first": "x"}))
    tables = faults_tables(results)
    assert "in a random tick | 2 | 1 | 0 |" in tables["faults"]
    assert "| all | 5 | 1 |" in tables["fuzzed"]


def test_every_kind_of_fault_is_tried() -> None:
    study = FaultStudy.small()
    contenders = [trial.contender for trial in study.trials(Results("faults", "faults"))]
    assert contenders == [*FAULTS, *(f"fuzzed {name}" for name in FUZZED), "saving"]
    assert sum(FUZZED.values()) == 10_000
    assert FUZZED.keys() == READERS.keys()


@pytest.mark.parametrize("name", READERS)
def test_files_from_strangers_are_read_or_refused(name: str, tmp_path: Path) -> None:
    assert fuzz(name, tmp_path, {"config": 5, "recipe": 10}.get(name, 50), seed=1) == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_each_fault_is_survived() -> None:
    study = FaultStudy.small()
    for name in FAULTS:
        found = study.run(Trial(name, 0))
        assert found["survived"] == found["tried"], (name, found)
        assert found.get("lost", 0) == 0, (name, found)
