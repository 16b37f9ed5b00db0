"""Peak live bytes of a training step against the number of blocks: what grows with depth, and what does not.

Counted, not sampled (`petra_zoo.reversible.LiveBytes`): the same number on every run. Parameters, their gradients,
buffers and the input are apart. Beside it, whole vision transformers (`memory_transformers`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

from petra_zoo.bench.built_in import BuiltInStudy
from petra_zoo.bench.charts import Chart, Panel, Point, Series
from petra_zoo.bench.markdown import cell, group_runs, markdown_table
from petra_zoo.bench.memory_transformers import (
    TransformerStep,
    measured_step,
    transformer_step,
    transformer_steps,
    transformer_table,
)
from petra_zoo.bench.results import Record, Results, Trial
from petra_zoo.bench.steps import FAMILY, StepShape, installed, number_of
from petra_zoo.strict_json import JsonObject

MIB = 2**20


@dataclass(frozen=True)
class MemoryStudy(BuiltInStudy):
    """Every contender at every depth.

    Attributes:
        depths: numbers of blocks, even ones.
        shape: of the step; its own number of blocks counts for nothing.
        transformers: steps of whole networks.
    """

    kind: ClassVar[str] = "memory"
    shares_the_machine: ClassVar[bool] = True
    depths: tuple[int, ...] = (4, 8, 16, 32, 64)
    shape: StepShape = field(default_factory=StepShape)
    transformers: tuple[TransformerStep, ...] = tuple(transformer_steps())

    @classmethod
    def small(cls) -> Self:
        shape = StepShape(channels=4, batch_size=2, img_size=6)
        return cls(depths=(2, 4), shape=shape, transformers=(), quick=True)

    def trials(self, results: Results) -> Sequence[Trial]:
        shapes = [replace(self.shape, blocks=depth) for depth in self.depths]
        by_depth = [Trial(name, 0, shape.settings()) for shape in shapes for name in FAMILY if installed(name)]
        return [*by_depth, *(step.trial for step in self.transformers)]

    def run(self, trial: Trial) -> JsonObject:
        if trial.settings.get("part") == "transformer":
            return measured_step(transformer_step(trial))
        from petra_zoo.bench.step_contenders import build_contender
        from petra_zoo.bench.step_runs import peak_step_bytes

        return {"peak_bytes": peak_step_bytes(*build_contender(trial.contender, StepShape.of(trial)))}


def memory_tables(results: Results) -> dict[str, str]:
    """`depth`: MiB of every contender by the number of blocks, and what each block between the deepest two adds.

    `transformers`: MiB per image of whole networks, where there are runs.
    """
    depths = sorted({number_of(run.trial, "blocks") for run in _by_depth(results)})
    rows = []
    for name, peaks in _peaks(results).items():
        *_, before, last = (0, *sorted(peaks))
        each = (peaks[last] - peaks[before]) / (last - before) if before else math.nan
        found = [cell(peaks.get(depth, math.nan), 1) for depth in depths]
        rows.append([FAMILY[name], name, *found, cell(each, 2)])
    columns = ["family", "contender", *(f"{depth} blocks" for depth in depths), "each further block"]
    whole = [run for run in results.runs if run.settings.get("part") == "transformer"]
    return {"depth": markdown_table(columns, rows)} | ({"transformers": transformer_table(whole)} if whole else {})


def memory_charts(results: Results) -> dict[str, Chart]:
    """`depth`: the same as lines, a panel for each family."""
    peaks = _peaks(results)
    panels = []
    for family in dict.fromkeys(FAMILY[name] for name in peaks):
        names = [name for name in FAMILY if FAMILY[name] == family]
        series = tuple(
            Series(name, place, place, tuple(Point(blocks, y, y, y) for blocks, y in sorted(peaks[name].items())))
            for place, name in enumerate(names)
            if name in peaks
        )
        title = {"streams": "coupled blocks on two streams", "layer": "a ResNet layer"}[family]
        panels.append(Panel(title, "residual blocks", "peak live MiB of a training step", series))
    return {"depth": Chart(tuple(panels))}


def _peaks(results: Results) -> dict[str, dict[int, float]]:
    """MiB by contender and number of blocks."""
    groups = group_runs(_by_depth(results), lambda run: run.contender)
    return {
        name: {number_of(run.trial, "blocks"): run.number("peak_bytes") / MIB for run in groups[name]}
        for name in FAMILY
        if name in groups
    }


def _by_depth(results: Results) -> list[Record]:
    return [run for run in results.runs if "part" not in run.settings]
