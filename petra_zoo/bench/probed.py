"""What probes saw of an accuracy study's stages while they trained, as a table and as a chart."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from petra_zoo.bench.accuracy_plan import AccuracyPlan
from petra_zoo.bench.charts import Chart, Panel, Point, Series
from petra_zoo.bench.markdown import markdown_table
from petra_zoo.bench.results import Record, Results

# What a probe measures (`petra_zoo.petra.probes.Measurement`), as axes call it, and the axis' scale.
_MEASURES = {
    "cosine": ("cosine to the exact gradient", "linear"),
    "norm_ratio": ("norm over the exact gradient's", "linear"),
    "reconstruction_error": ("relative error of the input", "log"),
}
_PARTS = ((0.0, 0.1), (0.45, 0.55), (0.9, 1.0))  # of training, in the table
_BINS = 20  # of training, in the chart
# Which stages of those with a delay a chart shows, by their place from the first to the last.
_PLACES = {
    0.0: "first stage",
    0.25: "at a quarter",
    0.5: "in the middle",
    0.75: "at three quarters",
    1.0: "last but one",
}


@dataclass(frozen=True)
class _Seen:
    """A measured value and when: from 0 at the beginning of training to 1 at its end."""

    time: float
    value: float


def probe_table(plan: AccuracyPlan, results: Results) -> str:
    """Of the stages that the chart shows, and the last: in the first, the middle and the last tenth of training."""
    rows = []
    for contender in plan.contenders:
        shown = {*_shown_stages(contender.stages), contender.stages - 1}
        for stage, seen in _by_stage(plan.runs(contender, results)).items():
            if stage not in shown:
                continue
            cells = [" / ".join(_shown(_within(seen[name], *part)) for part in _PARTS) for name in _MEASURES]
            rows.append([contender.name, str(stage), *cells])
    measures = [f"{name}, early / middle / late" for name in ("cosine", "norm ratio", "reconstruction error")]
    return markdown_table(["contender", "stage", *measures], rows)


def probe_chart(plan: AccuracyPlan, results: Results) -> Chart:
    """A row of panels for each contender with a delay: a measure each, over training, for a few of its stages."""
    panels = []
    for contender in plan.contenders:
        if not contender.delay:
            continue
        seen, shown = _by_stage(plan.runs(contender, results)), _shown_stages(contender.stages)
        for name, (label, scale) in _MEASURES.items():
            series = []
            for stage, where in shown.items():
                points = _binned(seen[stage][name]) if stage in seen else ()
                if scale == "log":  # which has no place for what is exact
                    points = tuple(point for point in points if point.y > 0)
                if points:
                    series.append(Series(where, list(_PLACES.values()).index(where), 0, points))
            title = contender.name if name == "cosine" else ""
            panels.append(Panel(title, "training, %", label, tuple(series), scale=scale))
    return Chart(tuple(panels), columns=len(_MEASURES))


def _shown_stages(stages: int) -> dict[int, str]:
    """Some of those with a delay, and where they are: a few stages have none at a quarter."""
    late = max(0, stages - 2)  # the last stage's gradient is exact
    return {int(place * late): where for place, where in _PLACES.items() if (place * late).is_integer()}


def _by_stage(runs: Sequence[Record]) -> dict[int, dict[str, list[_Seen]]]:
    """All measured values of some runs, by stage and measure."""
    found: dict[int, dict[str, list[_Seen]]] = defaultdict(lambda: {name: [] for name in _MEASURES})
    for run in runs:
        stages, batches = run.numbers("probe", "stage"), run.numbers("probe", "micro_batch")
        end = max(batches, default=0.0) or 1.0
        for name in _MEASURES:
            for stage, batch, value in zip(stages, batches, run.numbers("probe", name), strict=True):
                if not math.isnan(value):
                    found[int(stage)][name].append(_Seen(batch / end, value))
    return dict(sorted(found.items()))


def _within(seen: Sequence[_Seen], begin: float, end: float) -> list[float]:
    return [one.value for one in seen if begin <= one.time <= end]


def _shown(values: Sequence[float]) -> str:
    return f"{fmean(values):.3g}" if values else "-"


def _binned(seen: Sequence[_Seen]) -> tuple[Point, ...]:
    """Means over short stretches of training, in percent of it."""
    points = []
    for place in range(_BINS):
        values = _within(seen, place / _BINS, (place + 1) / _BINS)
        if values:
            mean = fmean(values)
            points.append(Point(100 * (place + 0.5) / _BINS, mean, mean, mean))
    return tuple(points)
