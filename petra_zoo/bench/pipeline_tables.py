"""What the pipeline study shows: images per second, peak live bytes, and how good the plan's predictions are."""

from __future__ import annotations

import math
from collections.abc import Iterable

from petra_zoo.bench.markdown import cell, group_runs, markdown_table, median_of
from petra_zoo.bench.pairs import Interval
from petra_zoo.bench.pipeline_jobs import BASELINE, OURS, SHARING, WITHOUT_LINKS, PipelineJob
from petra_zoo.bench.results import Record, Results

MIB = 2**20
# Of capacity, with two processes and work that can be divided at will: a stage that recomputes costs 4/3, the last one
# does not, and 3/7 in the first and 4/7 in the last are equally long; capacity, two trainings at once, takes half.
IDEAL = 0.875
_Runs = dict[str, list[Record]]  # of a part of the study, by label


def pipeline_tables(results: Results) -> dict[str, str]:
    """`speed`, its `summary` and `targets`; `memory-N` with N processes, more than two; `plan`: where there are any."""
    runs = [run for run in results.runs if not run.failed]
    ms = [PipelineJob.of(run.trial).m for run in runs]
    more = sorted({PipelineJob.of(run.trial).processes for run in runs} - {2})
    speed, memory, plan = _part(runs, "speed"), _part(runs, "memory"), _part(runs, "plan")
    found = {}
    if speed:
        found["speed"] = _speed(speed, memory)
        found["summary"] = _summary(speed, memory, max(ms))
        found["targets"] = _targets(speed, memory, _part(runs, "memory", 4), min(ms), max(ms))
    found |= {f"memory-{processes}": _memory(_part(runs, "memory", processes), processes) for processes in more}
    if plan:
        found["plan"] = _plan(plan)
    return found


def _part(runs: Iterable[Record], part: str, processes: int = 2) -> _Runs:
    jobs = [(PipelineJob.of(run.trial), run) for run in runs]
    chosen = {id(run): job.label for job, run in jobs if (job.part, job.processes) == (part, processes)}
    return group_runs((run for run in runs if id(run) in chosen), lambda run: chosen[id(run)])


def _speed(speed: _Runs, memory: _Runs) -> str:
    columns = ["contender", "split", "images/s best", "median", "over backprop", "of capacity", "MiB, rank 0",
               "rank 1"]  # fmt: skip
    rows = []
    for label, runs in speed.items():
        rows.append(
            [
                label,
                _split(runs),
                cell(median_of(runs, "images_per_second_best"), 1),
                cell(median_of(runs, "images_per_second"), 1),
                cell(median_of(runs, "over_backprop"), 2),
                _share(runs),
                *(_peaks(memory[label]) if label in memory else ["", ""]),
            ]
        )
    return markdown_table(columns, rows)


def _summary(speed: _Runs, memory: _Runs, m: int) -> str:
    columns = ["contender, two processes", "images/s over one-core backprop", "of the machine's capacity",
               "peak live MiB, rank 0 and 1"]  # fmt: skip
    rows = []
    for label in (BASELINE, *(f"{name}, {'k' if name in OURS else 'm'}={m}" for name in SHARING)):
        if runs := speed.get(label):
            peaks = [f"{peak / MIB:.1f}" for peak in _bytes(memory, label) if peak]
            ratios = cell(median_of(runs, "over_backprop"), 2), cell(median_of(runs, "of_capacity"), 3)
            rows.append([label, *ratios, ", ".join(peaks)])
    return markdown_table(columns, rows)


def _targets(speed: _Runs, two: _Runs, four: _Runs, low: int, high: int) -> str:
    """What was wanted of PETRA, and what was found; without the rows whose contenders were not run."""
    petra, plain = f"petra, k={high}", f"1F1B, m={high}"

    def share(label: str) -> float:
        """Of capacity, in the same rounds: contenders run at other times, when the machine may be faster."""
        return median_of(speed.get(label, []), "of_capacity")

    def live(memory: _Runs, label: str, rank: int | None = None) -> float:
        found = _bytes(memory, label) or [math.nan]
        return max(found) if rank is None else found[rank]

    checkpointed = f"1F1B + checkpointing, m={low}"
    checks = [
        ("petra over capacity", ">= 0.85", share(petra)),
        (f"petra over its ideal, {IDEAL} of capacity", ">= 0.985", share(petra) / IDEAL),
        (f"petra over 1F1B, m={high}", ">= 1", share(petra) / share(plain)),
        (f"petra over {checkpointed}", ">= 1.5", share(f"petra, k={low}") / share(checkpointed)),
        ("delayed over capacity", ">= 0.95", share(f"delayed, k={high}")),
        ("petra's tick over the slowest stage's compute", "<= 1.05",
         share(f"{WITHOUT_LINKS}, k={high}") / share(petra)),
        (f"live bytes over 1F1B's, m={high}, rank 0", "<= 0.25", live(two, petra, 0) / live(two, plain, 0)),
        (f"live bytes over 1F1B's, m={high}, last rank", "<= 1.2", live(two, petra, -1) / live(two, plain, -1)),
        (f"largest rank of 4 over 1F1B's, m={high}", "<= 0.5", live(four, petra) / live(four, plain)),
    ]  # fmt: skip
    rows = [[name, wanted, f"{ratio:.3f}"] for name, wanted, ratio in checks if not math.isnan(ratio)]
    return markdown_table(["target", "wanted", "found"], rows)


def _share(runs: list[Record]) -> str:
    """The median over rounds, and the interval in which their mean lies with 95 % confidence."""
    median = cell(median_of(runs, "of_capacity"), 3)
    rounds = [ratio for run in runs for ratio in _list(run, "of_capacity_rounds")]
    if len(rounds) < 2:
        return median
    found = Interval.of(rounds)
    return f"{median} ({found.low:.3f} to {found.high:.3f})"


def _memory(memory: _Runs, processes: int) -> str:
    columns = ["contender", *(f"rank {rank}" for rank in range(processes))]
    return markdown_table(columns, [[label, *_peaks(runs)] for label, runs in memory.items()])


def _plan(plan: _Runs) -> str:
    columns = ["contender", "units per stage", "predicted images/s", "measured", "predicted over measured"]
    numbers = (("predicted_images_per_second", 1), ("images_per_second", 1), ("predicted_over_measured", 3))
    rows = [
        [label, _split(runs), *(cell(median_of(runs, name), digits) for name, digits in numbers)]
        for label, runs in plan.items()
    ]
    return markdown_table(columns, rows)


def _peaks(runs: list[Record]) -> list[str]:
    """MiB of each process, and in parentheses what the plan predicts; counted, so the same in every repeat."""
    peaks = [peak if peak >= MIB / 20 else 0 for peak in _list(runs[0], "peak_bytes")]  # who waits has a few bytes
    measured = [f"{peak / MIB:.1f}" if peak else "" for peak in peaks]
    predicted = [f" ({peak / MIB:.1f})" for peak in _list(runs[0], "predicted_bytes")] or [""] * len(measured)
    return [found + plan for found, plan in zip(measured, predicted, strict=True)]


def _bytes(memory: _Runs, label: str) -> list[float]:
    return _list(memory[label][0], "peak_bytes") if label in memory else []


def _split(runs: list[Record]) -> str:
    return " + ".join(f"{units:.0f}" for units in _list(runs[0], "split"))


def _list(run: Record, name: str) -> list[float]:
    """A list of measured values; empty where there is none."""
    values = run.result.get(name)
    return [float(value) for value in values if isinstance(value, int | float)] if isinstance(values, list) else []
