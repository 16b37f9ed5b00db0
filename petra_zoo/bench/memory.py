"""Peak live bytes of a training step against the number of blocks: what grows with depth, and what does not.

Counted, not sampled (`petra_zoo.reversible.LiveBytes`): the same number on every run. Parameters, their gradients,
buffers and the input are apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from petra_zoo.bench.results import Results
from petra_zoo.bench.steps import FAMILY, StepShape, installed, left_out, number_of
from petra_zoo.bench.study import Study, Trial
from petra_zoo.bench.tables import markdown_table
from petra_zoo.strict_json import JsonObject

MIB = 2**20


@dataclass(frozen=True)
class MemoryStudy(Study):
    """Every contender at every depth.

    Attributes:
        depths: numbers of blocks, even ones.
        shape: of the step; its own number of blocks counts for nothing.
    """

    kind: ClassVar[str] = "memory"
    shares_the_machine: ClassVar[bool] = True
    depths: tuple[int, ...] = (4, 8, 16, 32, 64)
    shape: StepShape = StepShape()

    def notes(self) -> list[str]:
        return left_out()

    def trials(self, results: Results) -> Sequence[Trial]:
        shapes = [replace(self.shape, blocks=depth) for depth in self.depths]
        return [Trial(name, 0, shape.settings(name)) for shape in shapes for name in FAMILY if installed(name)]

    def run(self, trial: Trial) -> JsonObject:
        from petra_zoo.bench.step_contenders import build_contender, peak_step_bytes

        return {"peak_bytes": peak_step_bytes(*build_contender(trial.contender, StepShape.of(trial)))}

    def command(self, trial: Trial) -> str:
        return "petra-zoo bench memory"


def memory_tables(results: Results) -> dict[str, str]:
    """`depth`: MiB of every contender by the number of blocks, and what one more block adds between the last two."""
    depths = sorted({number_of(run.trial, "blocks") for run in results.runs})
    peaks: dict[str, dict[int, float]] = {}
    for run in results.runs:
        peaks.setdefault(run.contender, {})[number_of(run.trial, "blocks")] = run.number("peak_bytes") / MIB
    rows = []
    for name, found in sorted(peaks.items(), key=lambda item: list(FAMILY).index(item[0])):
        *_, before, last = (None, None, *sorted(found))
        each = None if before is None or last is None else (found[last] - found[before]) / (last - before)
        cells = [f"{found[depth]:.1f}" if depth in found else "-" for depth in depths]
        rows.append([FAMILY[name], name, *cells, "-" if each is None else f"{each:.2f}"])
    columns = ["family", "contender", *(f"{depth} blocks" for depth in depths), "each further block"]
    return {"depth": markdown_table(columns, rows)}
