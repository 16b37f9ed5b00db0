"""Charts of an accuracy study: what delay costs, and what stages compute while they train."""

from __future__ import annotations

import math
from collections import defaultdict

from petra_zoo.bench.accuracy_plan import AccuracyPlan, Contender
from petra_zoo.bench.accuracy_tables import paired_difference, plan_of, top1_values
from petra_zoo.bench.charts import Chart, Level, Panel, Point, Series
from petra_zoo.bench.pairs import MARGIN, Interval
from petra_zoo.bench.probed import probe_chart
from petra_zoo.bench.results import Results

_DELAY = "delay of the first stage, updates"


def accuracy_charts(results: Results) -> dict[str, Chart]:
    """Charts by name: `delay` where pairs are compared at several delays; `probes` where stages were probed."""
    plan = plan_of(results)
    found = {}
    if len({contender.delay for contender in plan.contenders if contender.paired_with}) > 1:
        found["delay"] = _delay(plan, results)
    if plan.probe:
        found["probes"] = probe_chart(plan, results)
    return found


def _delay(plan: AccuracyPlan, results: Results) -> Chart:
    """Top-1 against D_0, and the paired difference to the contender without delay: mean and 95 % interval."""
    opts = list(dict.fromkeys(contender.opt for contender in plan.contenders))
    kinds = list(dict.fromkeys(_kind(contender) for contender in plan.contenders if contender.paired_with))
    groups: dict[tuple[str, str], list[Contender]] = defaultdict(list)
    for contender in plan.contenders:
        if contender.paired_with:
            groups[contender.opt, _kind(contender)].append(contender)
    top1, lost = [], []
    for (opt, kind), members in groups.items():
        look = f"{opt}, {kind}", opts.index(opt), kinds.index(kind)
        baseline = plan.find(members[0].paired_with)
        top1.append(Series(*look, _points([(c, _top1(plan, c, results)) for c in (baseline, *members)])))
        lost.append(Series(*look, _points([(c, paired_difference(plan, c, results)) for c in members])))
    seeds = max((len(top1_values(plan, c, results)) for c in plan.contenders), default=0)
    levels = (Level(0, "no difference"), Level(-MARGIN, f"{MARGIN} points lost"))
    left = Panel(f"{plan.contenders[0].recipe}, up to {seeds} seeds", _DELAY, "validation top-1, %", tuple(top1))
    difference, title = "difference in top-1, points", "minus backpropagation, same seeds"
    return Chart((left, Panel(title, _DELAY, difference, tuple(lost), levels, apart=True, scale="symlog")))


def _kind(contender: Contender) -> str:
    """What it is but for optimizer and delay."""
    predicted = contender.settings.get("weight_prediction", "none")
    return f"{contender.method}, J = {contender.stages}" + (f", {predicted} predicted" if predicted != "none" else "")


def _top1(plan: AccuracyPlan, contender: Contender, results: Results) -> Interval | None:
    values = top1_values(plan, contender, results)
    return Interval.of(values) if values else None


def _points(found: list[tuple[Contender, Interval | None]]) -> tuple[Point, ...]:
    points = []
    for contender, interval in found:
        if interval is not None:
            reach = interval.half_width if math.isfinite(interval.half_width) else 0.0
            points.append(Point(contender.delay, interval.mean, interval.mean - reach, interval.mean + reach))
    return tuple(sorted(points, key=lambda point: point.x))
