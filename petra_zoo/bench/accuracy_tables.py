"""What an accuracy study shows: top-1 by contender, paired differences with their verdicts, the search, the probes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from pydantic import ValidationError

from petra_zoo.bench.accuracy_plan import AccuracyPlan, Contender
from petra_zoo.bench.markdown import markdown_table
from petra_zoo.bench.pairs import MARGIN, Interval, seeds_needed, verdict
from petra_zoo.bench.probed import probe_table
from petra_zoo.bench.results import Record, Results
from petra_zoo.errors import UserError


def plan_of(results: Results) -> AccuracyPlan:
    """The study that a results file is of.

    Raises:
        UserError: the file does not say.
    """
    try:
        return AccuracyPlan.model_validate(results.about)
    except ValidationError as error:
        raise UserError(f"the results of '{results.study}' do not say what was compared: {error.errors()[0]['msg']}; "
                        "petra-zoo bench accuracy STUDY.yaml --output FILE writes it anew") from error  # fmt: skip


def accuracy_tables(results: Results) -> dict[str, str]:
    """Tables by name: `accuracy` always; `summary` of several tasks; `search`, `spread` and `probes` where they are."""
    plan = plan_of(results)
    found = {"accuracy": _accuracy(plan, results)}
    if len(plan.tasks) > 1:
        found["summary"] = _summary(plan, results)
    if spread := _spread(plan, results):
        found["spread"] = spread
    if any(contender.rates for contender in plan.contenders):
        found["search"] = _search(plan, results)
    if plan.probe:
        found["probes"] = probe_table(plan, results)
    return found


def paired_difference(plan: AccuracyPlan, contender: Contender, results: Results) -> Interval | None:
    """Top-1 minus the baseline's, in points, over the seeds that both have finished; None where there are none."""
    if not contender.paired_with:
        return None
    ours, theirs = (_by_seed(plan.runs(c, results)) for c in (contender, plan.find(contender.paired_with)))
    differences = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    return Interval.of(differences) if differences else None


def top1_values(plan: AccuracyPlan, contender: Contender, results: Results) -> list[float]:
    """Top-1 in percent of the runs that count and did not fail."""
    return list(_by_seed(plan.runs(contender, results)).values())


def _by_seed(runs: Sequence[Record]) -> dict[int, float]:
    return {run.repeat: _top1(run) for run in runs if not run.failed}


def _top1(run: Record) -> float:
    """What every run that did not fail has measured.

    Raises:
        UserError: it is not in the file, which somebody has changed.
    """
    top1 = run.number("top1")
    if not math.isfinite(top1):
        raise UserError(f"results: the run {run.trial} has no top1: take it out, and petra-zoo bench repeats it")
    return top1


def _accuracy(plan: AccuracyPlan, results: Results) -> str:
    several = len(plan.tasks) > 1
    columns = ["contender", "D_0", "lr", "n", "top-1, %", "minus baseline, points", "verdict"]
    rows = []
    for contender in plan.contenders:
        runs = plan.runs(contender, results)
        difference = paired_difference(plan, contender, results)
        good = [run for run in runs if not run.failed]
        failed = f" ({len(runs) - len(good)} diverged)" if len(good) < len(runs) else ""
        rows.append(
            [
                *([contender.task] if several else []),
                contender.label,
                f"{contender.delay:g}",
                _rate(plan, contender, results),
                f"{len(good)}{failed}",
                mean_and_range([_top1(run) for run in good]),
                "" if difference is None else shown_interval(difference),
                "" if difference is None else verdict(difference),
            ]
        )
    return markdown_table(["data", *columns] if several else columns, rows)


def _summary(plan: AccuracyPlan, results: Results) -> str:
    labels = dict.fromkeys(contender.label for contender in plan.contenders)
    cells = {(c.label, c.task): mean_and_range(top1_values(plan, c, results)) for c in plan.contenders}
    return markdown_table(
        ["method", *plan.tasks], [[label, *(cells[label, task] for task in plan.tasks)] for label in labels]
    )


def _spread(plan: AccuracyPlan, results: Results) -> str:
    rows = []
    for contender in plan.contenders:
        difference = paired_difference(plan, contender, results)
        if difference is not None and difference.count > 1:
            enough = seeds_needed(difference.spread)
            needed = "more than 20" if enough is None else str(enough)
            rows.append([contender.name, str(difference.count), f"{difference.spread:.2f}", needed])
    columns = ["contender", "pairs", "spread of the difference, points", f"pairs for an interval of +-{MARGIN}"]
    return markdown_table(columns, rows) if rows else ""


def _search(plan: AccuracyPlan, results: Results) -> str:
    rows = []
    for contender in plan.contenders:
        taken = plan.rate(contender, results)
        cells = []
        for rate, run in plan.tried(contender, results).items():
            found = "" if run is None else "diverged" if run.failed else f"{run.number('top1'):.2f}"
            cells.append(f"**{rate:g}: {found}**" if rate == taken else f"{rate:g}: {found}")
        if cells:
            rows.append([contender.name, ", ".join(cells)])
    return markdown_table(["contender", "top-1 in percent by learning rate; taken: bold"], rows)


def _rate(plan: AccuracyPlan, contender: Contender, results: Results) -> str:
    rate = plan.rate(contender, results) if contender.rates_of else contender.settings.get("lr")
    return f"{rate:g}" if isinstance(rate, int | float) else ""


def mean_and_range(values: Sequence[float]) -> str:
    """`98.98 (98.06 to 99.72)`; nothing of nothing."""
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{fmean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def shown_interval(interval: Interval) -> str:
    """`-0.31 (-0.72 to 0.10)`; of one pair the difference alone."""
    if interval.count < 2:
        return f"{interval.mean:.2f}"
    return f"{interval.mean:.2f} ({interval.low:.2f} to {interval.high:.2f})"
