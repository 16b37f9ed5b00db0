"""The tables of timm's families, from what a sweep has found."""

from petra_zoo.bench.families import families_tables
from petra_zoo.bench.results import Record, Results
from petra_zoo.strict_json import JsonObject


def network(name: str, family: str, *chains: JsonObject, covered: float = 0.0, twin: bool = False) -> Record:
    result: JsonObject = {"family": family, "twin": twin, "activations_covered": covered, "chains": list(chains)}
    return Record(name, 0, {"of": "network"}, "sweep", result)


def chain(runs: list[int], *, one_by_one: bool = False, far: bool = False) -> JsonObject:
    kinds: JsonObject = {"kinds": ["Block"], "block": "Block-1"}
    return {**kinds, "runs": list(runs), "one_by_one": one_by_one, "far": far}


def test_networks_are_judged_by_their_longest_chains() -> None:
    results = Results("families", "families", {"names": {"mixer": 5}})
    for run in (
        network("mixer_s", "mixer", chain([8]), chain([2], far=True), covered=0.9),
        network("mixer_b", "mixer", chain([12]), covered=0.7),
        network("eva", "eva", chain([12], one_by_one=True), twin=True),
        network("twins", "twins", chain([12], one_by_one=True)),
        network("hgnet", "hgnet", chain([5], far=True)),
        network("vgg", "vgg", chain([2])),
        Record("looks_at_values", 0, {"of": "network"}, "sweep", {"family": "vgg", "failed": "RuntimeError: item()"}),
        Record("Block-2", 0, {"of": "block", "network": "mixer_s"}, "gradients", {"failed": "too large"}),
        Record("Block-1", 0, {"of": "block"}, "gradients", {"difference": 3e-15}),
    ):
        results.add(run)
    tables = families_tables(results)
    assert [line.split("|")[2].strip() for line in tables["totals"].splitlines()[2:]] == ["2", "1", "1", "1", "1", "1"]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in tables["families"].splitlines()[2:]]
    assert rows[2] == ["mixer", "2 of 5", "2", "", "", "", "", "", "Block", "12", "0.80", "3e-15"]
    assert rows[0][:6] == ["eva", "1", "", "1", "", ""]
    assert rows[4][:8] == ["vgg", "2", "", "", "", "", "1", "1"]
    assert tables["unchecked"].splitlines()[2:] == ["| Block-2 | mixer_s | too large |"]
