"""Time of a training step through the same blocks: stored, recomputed, or reversible; and of whole recipes.

A run measures one contender and its references: they take turns, round by round, in one process on one thread, and
ratios are taken within a round. So a run can be trusted alone, and a contender that is added later, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from petra_zoo.bench.results import Results
from petra_zoo.bench.steps import FAMILY, LAYER, STREAMS, StepShape, installed, left_out, number_of
from petra_zoo.bench.study import Study, Trial, interleaved
from petra_zoo.bench.tables import markdown_table
from petra_zoo.strict_json import JsonObject

@dataclass(frozen=True)
class SpeedStudy(Study):
    """Every contender against the references of its family.

    Attributes:
        repeats: how often, each time in a new network.
        rounds: steps that are timed.
        shape: of a step.
    """

    kind: ClassVar[str] = "speed"
    repeats: int = 1
    rounds: int = 16
    shape: StepShape = StepShape()

    def notes(self) -> list[str]:
        return left_out()

    def trials(self, results: Results) -> Sequence[Trial]:
        names = [name for name in FAMILY if installed(name)]
        turns = interleaved(names, range(self.repeats), shuffled=True)
        return [Trial(name, repeat, {**self.shape.settings(name), "rounds": self.rounds}) for name, repeat in turns]

    def run(self, trial: Trial) -> JsonObject:
        from petra_zoo.bench.step_runs import measure_step

        return measure_step(trial.contender, StepShape.of(trial), number_of(trial, "rounds"))

    def command(self, trial: Trial) -> str:
        return "petra-zoo bench speed"
