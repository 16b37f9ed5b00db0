"""What a run survives: faults that are injected, counted, and what they cost.

Runs are of a tiny network in two processes, forked from one that has everything imported, or in one; what they end with
is compared, byte for byte, with a run that was never disturbed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from petra_zoo.bench.built_in import BuiltInStudy
from petra_zoo.bench.markdown import cell, group_runs, markdown_table
from petra_zoo.bench.results import Record, Results, Trial
from petra_zoo.strict_json import JsonObject

if TYPE_CHECKING:
    from petra_zoo.bench.fault_runs import Laboratory


@dataclass(frozen=True)
class Fault:
    """A kind of fault.

    Attributes:
        words: what a table calls it.
        times: how many trials; `each`: how many faults in one.
        runs: whether a run is disturbed, which then has to go on.
    """

    words: str
    times: int
    each: int = 1
    runs: bool = True


FAULTS = {
    "killed": Fault("`kill -9` of one of two processes, in a random tick", 30),
    "launched": Fault("the same, started again by `--max-restarts`", 3),
    "stopped": Fault("SIGTERM in a random tick", 4),
    "frozen": Fault("one of two processes frozen (SIGSTOP), in a random tick", 2),
    "nan, stop": Fault("a gradient of a random stage and tick not finite, `on_nonfinite=stop`", 4),
    "nan, skip": Fault("the same, `on_nonfinite=skip`", 4),
    "killed in a save": Fault("`kill -9` behind each step of a save", 1, runs=False),
    "disk full": Fault("the disk full at each write of a save", 1, runs=False),
    "flipped": Fault("a bit of a checkpoint flipped: header, data or manifest", 1, 600, runs=False),
}
FUZZED = {"manifest": 4000, "profile": 2500, "recipe": 1500, "npz": 1500, "config": 500}  # files from strangers
# What saving costs, beside the ticks in between.
SAVING: JsonObject = {"recipe": "cifar10/petra_revnet18_cifar", "stages": 4, "size": 32, "ticks": 3, "between": 100}
SMALL_SAVING: JsonObject = {**SAVING, "recipe": "digits/petra_revnet_tiny", "size": 8}


@dataclass(frozen=True)
class FaultStudy(BuiltInStudy):
    """All faults, and files from strangers.

    Attributes:
        times: at most so many trials of a fault; None: as many as there are.
        share: of the files from strangers.
    """

    kind: ClassVar[str] = "faults"
    times: int | None = None
    share: float = 1.0

    @classmethod
    def small(cls) -> Self:
        return cls(times=1, share=0.01, quick=True)

    def trials(self, results: Results) -> Sequence[Trial]:
        faults = [Trial(name, n) for name, fault in FAULTS.items() for n in range(min(fault.times, self.times or 99))]
        counts = {name: max(1, int(count * self.share)) for name, count in FUZZED.items()}
        fuzzed = [Trial(f"fuzzed {name}", 0, {"files": count}) for name, count in counts.items()]
        return [*faults, *fuzzed, Trial("saving", 0, SMALL_SAVING if self.quick else SAVING)]

    def run(self, trial: Trial) -> JsonObject:
        from petra_zoo.bench.fault_runs import fuzzed

        if trial.contender == "saving":
            from petra_zoo.bench.saving_cost import saving_cost

            return saving_cost(trial.settings)
        if trial.contender.startswith("fuzzed "):
            return fuzzed(trial.contender.removeprefix("fuzzed "), trial.settings)
        work: dict[str, Callable[[Laboratory], JsonObject]] = self._works(trial.repeat)
        from petra_zoo.bench.fault_runs import laboratory

        with laboratory() as found:
            return work[trial.contender](found)

    def _works(self, seed: int) -> dict[str, Callable[[Laboratory], JsonObject]]:
        return {
            "killed": lambda lab: lab.kill(seed),
            "launched": lambda lab: lab.kill_launched(seed),
            "stopped": lambda lab: lab.stop(seed),
            "frozen": lambda lab: lab.freeze(seed),
            "nan, stop": lambda lab: lab.spoil(seed, "stop"),
            "nan, skip": lambda lab: lab.spoil(seed, "skip"),
            "killed in a save": lambda lab: lab.kill_in_a_save(),
            "disk full": lambda lab: lab.fill_the_disk(),
            "flipped": lambda lab: lab.flip(FAULTS["flipped"].each),
        }


def faults_tables(results: Results) -> dict[str, str]:
    """`faults`: injected, survived, updates lost; `fuzzed`: files from strangers; `saving`: what it costs."""
    groups = group_runs(results.runs, lambda run: run.contender)
    rows = [
        [
            fault.words,
            _total(groups[name], "tried"),
            _total(groups[name], "survived"),
            _total(groups[name], "lost") if fault.runs else "",
        ]
        for name, fault in FAULTS.items()
        if name in groups
    ]
    columns = ["fault", "injected", "survived, or detected", "updates lost beyond the last save"]
    fuzzed = {name: groups[f"fuzzed {name}"] for name in FUZZED if f"fuzzed {name}" in groups}
    files = [[name, _total(runs, "tried"), _total(runs, "faults")] for name, runs in fuzzed.items()]
    totals = [sum(int(row[place]) for row in files) for place in (1, 2)]
    files.append(["all", *map(str, totals)])
    saving = [
        [
            str(run.settings["recipe"]),
            cell(run.number("tick_seconds"), 2),
            cell(run.number("bytes") / 2**20, 0),
            cell(run.number("save_seconds"), 2),
            cell(100 * run.number("share"), 2),
        ]
        for run in groups.get("saving", ())
    ]
    return {
        "saving": markdown_table(
            ["recipe", "s of a tick", "MiB saved", "s of a save", "% of the time, saving every 100 ticks"], saving
        ),
        "faults": markdown_table(columns, rows),
        "fuzzed": markdown_table(["file", "fuzzed", "neither read nor refused in one line"], files),
    }


def _total(runs: Sequence[Record], name: str) -> str:
    return str(int(sum(run.number(name) for run in runs)))
