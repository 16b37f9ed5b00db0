"""Markdown tables of `benchmarks/gpu.py`. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from petra_zoo.bench.markdown import cell, markdown_table
from petra_zoo.bench.results import Record, Results

_CHECKPOINTED = "timm, checkpointed"


def gpu_tables(results: Results) -> dict[str, str]:
    """By name: of a GPU `machine`, `tests`, `step`, `tick`, `side_by_side`; `live`, `moved`, `operations`, `host`."""
    sections: dict[str, list[Record]] = {}
    for run in results.runs:
        section = str(run.settings["section"])
        sections.setdefault(run.contender if section == "cpu" else section, []).append(run)
    return {name: table(sections.get(section, [])) for section, (name, table) in _TABLES.items()}


def _steps(runs: Sequence[Record]) -> str:
    columns = ["network", "way", "kernels, ms", "over timm", "over checkpointing", "MiB per image", "over timm",
               "over checkpointing", "eager, ms", "peak, MiB", "largest batch in 80 GiB"]  # fmt: skip
    memory = {(run.settings["network"], run.contender): run.number("mib_per_image") for run in runs}
    rows = []
    for network in dict.fromkeys(run.settings["network"] for run in runs):
        for run in (run for run in runs if run.settings["network"] == network):
            per_image = run.number("mib_per_image")
            over = [cell(per_image / memory.get((network, other), math.nan), 2) for other in ("timm", _CHECKPOINTED)]
            times = [("captured_ms", 1), ("captured_over_plain", 2), ("captured_over_checkpointed", 2)]
            others = [("eager_ms", 1), ("peak_mib", 0), ("largest_batch", 0)]
            rows.append(
                [str(network), run.contender, *_cells(run, times), cell(per_image, 1), *over, *_cells(run, others)]
            )
    return markdown_table(columns, rows)


def _ticks(runs: Sequence[Record]) -> str:
    columns = ["network", "method", "tick, ms", "over bare replay", "host, ms", "kernels", "GPU busy", "peak, MiB"]
    rows = []
    for run in runs:
        busy = 100 * run.number("busy_ms") / run.number("tick_ms")
        rows.append(
            [
                f"{_subject(run)}, {run.settings['batch']} at {run.settings['image']}",
                run.contender + (" (it cannot be)" if "not_captured" in run.result else ""),
                cell(run.number("tick_ms"), 1),
                cell(run.number("over_replay"), 2),
                cell(run.number("host_ms"), 1),
                cell(run.number("kernels"), 0),
                cell(busy, 0, " %"),
                cell(run.number("peak_mib"), 0),
            ]
        )
    return markdown_table(columns, rows)


def _side_by_side(runs: Sequence[Record]) -> str:
    columns = ["network, batch", "backpropagation, ms", "PETRA in one stream, ms", "stages side by side, ms",
               "over backpropagation", "the same, replays alone", "MiB: backpropagation", "one stream",
               "side by side"]  # fmt: skip
    numbers = [("backprop_tick_ms", 2), ("one_stream_tick_ms", 2), ("side_by_side_tick_ms", 2),
               ("side_by_side_tick_over_backprop", 2), ("side_by_side_replay_over_backprop", 2),
               ("backprop_peak_mib", 0), ("one_stream_peak_mib", 0), ("side_by_side_peak_mib", 0)]  # fmt: skip
    return markdown_table(columns, ([f"{run.settings['network']}, {run.settings['batch']}", *_cells(run, numbers)]
                                    for run in runs))  # fmt: skip


def _facts(runs: Sequence[Record]) -> str:
    names = {"device": "GPU", "memory_mib": "memory, MiB", "driver": "driver", "cuda": "CUDA", "cudnn": "cuDNN"}
    return markdown_table([*names.values()], ([str(run.result.get(name, "-")) for name in names] for run in runs))


def _tests(runs: Sequence[Record]) -> str:
    return markdown_table(
        ["command", "what it says"], ([run.contender, str(run.result.get("summary"))] for run in runs)
    )


def _live(runs: Sequence[Record]) -> str:
    columns = ["MiB per image, float32", "timm", "checkpointed", "plain", "reversible", "reversible over checkpointed"]
    numbers = [(name, 1) for name in ("timm", "checkpointed", "plain", "reversible")]
    return markdown_table(columns, ([str(run.settings["network"]), *_cells(run, [*numbers, ("over_checkpointed", 2)])]
                                    for run in runs))  # fmt: skip


def _moved(runs: Sequence[Record]) -> str:
    columns = ["GiB in a step, bfloat16", "timm", "checkpointed", "plain", "reversible", "plain over timm",
               "reversible over checkpointed"]  # fmt: skip
    numbers = [(name, 1) for name in ("timm", "checkpointed", "plain", "reversible")]
    ratios = [("plain_over_timm", 2), ("reversible_over_checkpointed", 2)]
    return markdown_table(columns, ([str(run.settings["network"]), *_cells(run, [*numbers, *ratios])]
                                    for run in runs))  # fmt: skip


def _by_name(first: str, digits: int) -> Callable[[Sequence[Record]], str]:
    def table(runs: Sequence[Record]) -> str:
        names = [*runs[0].result] if runs else []
        rows = ([_subject(run), *_cells(run, [(name, digits) for name in names])] for run in runs)
        return markdown_table([first, *(name.replace("_", " ") for name in names)], rows)

    return table


def _subject(run: Record) -> str:
    return ", ".join(str(run.settings[name]) for name in ("network", "streams") if name in run.settings)


def _cells(run: Record, numbers: Iterable[tuple[str, int]]) -> list[str]:
    return [cell(run.number(name), digits) for name, digits in numbers]


# By section, or by what stands in for one: a table's name, and what makes it.
_TABLES: dict[str, tuple[str, Callable[[Sequence[Record]], str]]] = {
    "facts": ("machine", _facts),
    "step": ("step", _steps),
    "tick": ("tick", _ticks),
    "side_by_side": ("side_by_side", _side_by_side),
    "tests": ("tests", _tests),
    "live bytes": ("live", _live),
    "moved bytes": ("moved", _moved),
    "operations of a tick": ("operations", _by_name("operations in a tick", 0)),
    "host time": ("host", _by_name("step on two images of 32x32", 2)),
}
