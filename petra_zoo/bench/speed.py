"""Time of a training step: through the same blocks, stored, recomputed, or reversible; of whole networks and recipes.

A run measures one contender and its references: they take turns, round by round, in one process on one thread, and
ratios are taken within a round. So a run can be trusted alone, and a contender that is added later, too.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Self

from petra_zoo.bench.built_in import BuiltInStudy
from petra_zoo.bench.markdown import cell, group_runs, markdown_table, median_of
from petra_zoo.bench.memory_transformers import CHECKPOINTED, REVERSIBLE, TransformerStep, transformer_step
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


# Networks, the size of their images, and how many are in a step.
_TRANSFORMERS = (("vit_small_patch16_224", 224, 4), ("vit_large_patch16_224", 224, 2))


@dataclass(frozen=True)
class SpeedStudy(BuiltInStudy):
    """Every contender against the references of its family.

    Attributes:
        repeats: how often, each time in a new network.
        rounds: steps that are timed.
        shape: of a step.
        recipes: whose whole training is timed.
        transformers: networks, the size of their images, how many are in a step; timed in every way beside plain.
        transformer_rounds: steps of those that are timed.
    """

    kind: ClassVar[str] = "speed"
    repeats: int = 1
    rounds: int = 16
    shape: StepShape = field(default_factory=StepShape)
    recipes: tuple[str, ...] = tuple(RECIPES)
    transformers: tuple[tuple[str, int, int], ...] = _TRANSFORMERS
    transformer_rounds: int = 5

    @classmethod
    def small(cls) -> Self:
        shape, recipes = StepShape(4, 4, 2, 6), ("digits/petra_revnet_tiny",)
        transformers = (("test_vit", 32, 2),)
        return cls(rounds=2, shape=shape, recipes=recipes, transformers=transformers, transformer_rounds=2, quick=True)

    def trials(self, results: Results) -> Sequence[Trial]:
        contenders = [name for name in FAMILY if installed(name)]
        blocks_and_recipes = [
            Trial(name, repeat, self._settings(name))
            for name, repeat in interleaved([*contenders, *self.recipes], range(self.repeats), shuffled=True)
        ]
        return [*blocks_and_recipes, *self._of_transformers()]

    def _of_transformers(self) -> Iterator[Trial]:
        for network, img_size, images in self.transformers:
            for way in (CHECKPOINTED, *REVERSIBLE):
                trial = TransformerStep(network, img_size, way).trial
                more = {"batch_size": images, "rounds": self.transformer_rounds}
                yield replace(trial, settings={**trial.settings, **more})

    def _settings(self, name: str) -> JsonObject:
        if name in RECIPES:
            return {"overrides": RECIPES[name]}
        return {**self.shape.settings(), "rounds": self.rounds}

    def run(self, trial: Trial) -> JsonObject:
        from petra_zoo.bench.step_runs import measure_step, measure_transformer_step

        if trial.settings.get("part") == "transformer":
            batch_size, rounds = number_of(trial, "batch_size"), number_of(trial, "rounds")
            return measure_transformer_step(transformer_step(trial), batch_size, rounds)
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
    """`step`: every contender; `streams`: what other libraries do with the same blocks; `transformers`; `recipes`."""
    of_transformers = [run for run in results.runs if run.settings.get("part") == "transformer"]
    groups = group_runs([run for run in results.runs if "part" not in run.settings], lambda run: run.contender)
    steps = [(name, groups[name]) for name in FAMILY if name in groups]
    recipes = [[name, cell(median_of(groups[name], "images_per_second"), 0)] for name in RECIPES if name in groups]
    return {
        "step": _step_table(steps),
        "streams": _streams_table(steps),
        **({"transformers": _transformer_table(of_transformers)} if of_transformers else {}),
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


def _transformer_table(runs: Sequence[Record]) -> str:
    columns = ["network", "images in a step", "way", "over plain", "least and most", "median ms"]
    rows = []
    for run in runs:
        least, most = (f"{run.number(name):.2f}" for name in ("least_over_reference", "most_over_reference"))
        median, milliseconds = cell(run.number("over_reference"), 2), cell(run.number("step_ms"), 0)
        row = [str(run.settings["network"]), str(run.settings["batch_size"]), run.contender]
        rows.append([*row, median, f"{least} to {most}", milliseconds])
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
