"""Time of a training step through the same blocks: stored, recomputed, or reversible; and of whole recipes.

A run measures one contender and its references: they take turns, round by round, in one process on one thread, and
ratios are taken within a round. So a run can be trusted alone, and a contender that is added later, too.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Self

from petra_zoo.bench.built_in import BuiltInStudy
from petra_zoo.bench.markdown import cell, group_runs, markdown_table, median_of
from petra_zoo.bench.results import Record, Results, Trial
from petra_zoo.bench.steps import FAMILY, REFERENCES, StepShape, installed, number_of
from petra_zoo.bench.study import interleaved
from petra_zoo.settings.recipe_files import load_recipe
from petra_zoo.strict_json import JsonObject

MIB = 2**20
# Long enough for what happens once, at the start, not to count; validated once, which does not count either.
RECIPES = {
    "digits/petra_revnet_tiny": ["epochs=4", "val_interval=4"],
    "shapes/petra_revnet_tiny": ["epochs=1", "workers=0"],
}


@dataclass(frozen=True)
class SpeedStudy(BuiltInStudy):
    """Every contender against the references of its family.

    Attributes:
        repeats: how often, each time in a new network.
        rounds: steps that are timed.
        shape: of a step.
        recipes: whose whole training is timed.
    """

    kind: ClassVar[str] = "speed"
    repeats: int = 1
    rounds: int = 16
    shape: StepShape = field(default_factory=StepShape)
    recipes: tuple[str, ...] = tuple(RECIPES)

    @classmethod
    def small(cls) -> Self:
        return cls(rounds=2, shape=StepShape(4, 4, 2, 6), recipes=("digits/petra_revnet_tiny",), quick=True)

    def trials(self, results: Results) -> Sequence[Trial]:
        contenders = [name for name in FAMILY if installed(name)]
        return [
            Trial(name, repeat, self._settings(name))
            for name, repeat in interleaved([*contenders, *self.recipes], range(self.repeats), shuffled=True)
        ]

    def _settings(self, name: str) -> JsonObject:
        if name in RECIPES:
            return {"overrides": RECIPES[name]}
        return {**self.shape.settings(), "rounds": self.rounds}

    def run(self, trial: Trial) -> JsonObject:
        from petra_zoo.bench.step_runs import measure_step

        if trial.contender in RECIPES:
            return _train(trial.contender)
        return measure_step(trial.contender, StepShape.of(trial), number_of(trial, "rounds"))


def _train(recipe: str) -> JsonObject:
    """A recipe's training, loader included, by images per second."""
    from petra_zoo.bench.training_run import measured_training

    with tempfile.TemporaryDirectory() as folder:
        overrides = [*RECIPES[recipe], f"output={Path(folder) / 'run'}"]
        found = measured_training(load_recipe(recipe, overrides), None)
    return {name: found[name] for name in ("images_per_second", "seconds")}


def speed_tables(results: Results) -> dict[str, str]:
    """`step`: every contender; `streams`: what other libraries do with the same blocks; `recipes`: images/s."""
    groups = group_runs(results.runs, lambda run: run.contender)
    steps = [(name, groups[name]) for name in FAMILY if name in groups]
    recipes = [[name, cell(median_of(groups[name], "images_per_second"), 0)] for name in RECIPES if name in groups]
    return {
        "step": _step_table(steps),
        "streams": _streams_table(steps),
        **({"recipes": markdown_table(["recipe", "images/s"], recipes)} if recipes else {}),
    }


def _step_table(steps: Sequence[tuple[str, list[Record]]]) -> str:
    columns = ["family", "contender", "over reference", "over plain memory", "best ms", "median ms",
               "batch-norm updates per step", "MiB for each further block"]  # fmt: skip
    rows = []
    for name, runs in steps:
        numbers = [("over_reference", 2), ("over_plain_memory", 2), ("step_ms_best", 0), ("step_ms", 0)]
        cells = [cell(median_of(runs, value), digits) for value, digits in (*numbers, ("batch_norm_updates", 0))]
        rows.append([FAMILY[name], name, *cells, cell(median_of(runs, "bytes_per_block") / MIB, 2)])
    return markdown_table(columns, rows)


def _streams_table(steps: Sequence[tuple[str, list[Record]]]) -> str:
    columns = ["", "step time", "batch-norm updates per step", "MiB for 8 more blocks"]
    rows = []
    for name, runs in steps:
        if FAMILY[name] != "streams" or name in REFERENCES["streams"].values():
            continue
        release = runs[0].result.get("release")
        more = 8 * median_of(runs, "bytes_per_block") / MIB
        rows.append(
            [
                f"{name} {release}" if release else name,
                cell(median_of(runs, "over_reference"), 2),
                cell(median_of(runs, "batch_norm_updates"), 0),
                cell(more, 0),
            ]
        )
    return markdown_table(columns, rows)
