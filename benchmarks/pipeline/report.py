"""The README.md of the results: tables from results.json, nothing typed by hand.

python benchmarks/pipeline/report.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MIB = 2**20
STEADY = 1.3


def markdown(result: dict[str, Any]) -> str:
    """README of a comparison, or of the plan's validation."""
    return _validation(result) if "link" in result else _comparison(result)


def _comparison(result: dict[str, Any]) -> str:
    s = result["settings"]
    load = result["load_average"]
    blocks = len(load)
    peaks = result["peak_live_bytes"]
    two = peaks.get("2", {})
    lines = [
        "# PETRA on processes, beside torch's pipelines, DDP and plain training",
        "",
        f"The same reversible network of {s['blocks'] + 2} units (stem, {s['blocks']} blocks of {s['channels']} "
        f"channels, head; {s['size']}x{s['size']} images), micro-batches of {s['batch_size']}, two gloo processes with "
        f"one thread each, one interleaved run of {blocks} rounds with {s['updates']} updates of every contender, "
        "optimizer step included. The number of blocks was chosen so that whole units can be divided evenly both in "
        "halves and in PETRA's ratio of 3 to 4. m: micro-batches per update (k for ours). Capacity: two plain "
        "backpropagations at once that do not know each other. Split: units of each process, by the contender's own "
        "cost. Ratios are medians of ratios within a round. Live MiB: peak in each process, parameters and images "
        "apart; in parentheses what petra-zoo plan predicts.",
        "",
        "| contender | split | images/s best | median | over backprop | of capacity (best) | MiB, rank 0 | rank 1 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        peak = _peaks(two.get(row["contender"], {"measured": [0, 0]}))
        split = " + ".join(map(str, row["split"] or []))
        lines.append(
            f"| {row['contender']} | {split} | {row['images_per_second_best']:.1f} "
            f"| {_median(row):.1f} | {row['of_backprop']:.2f} "
            f"| {row['of_capacity']:.3f} ({row['of_capacity_best']:.3f}) | {peak[0]} | {peak[1]} |"
        )
    unsteady = [r["contender"] for r in result["rows"] if r["images_per_second_best"] > STEADY * _median(r)]
    if unsteady:
        lines += ["", f"Not fit to be quoted, best over median above {STEADY}: {'; '.join(unsteady)}."]
    lines += ["", *_targets(result)]
    for processes, found in peaks.items():
        if processes != "2" or not result["rows"]:
            ranks = range(int(processes))
            lines += ["", f"Peak live MiB with {processes} processes:", ""]
            lines += ["| contender | " + " | ".join(f"rank {r}" for r in ranks) + " |", "|---" * (1 + len(ranks)) + "|"]
            for name, sizes in found.items():
                lines.append(f"| {name} | " + " | ".join(_peaks(sizes)) + " |")
    return "\n".join([*lines, "", *_footer(result)])


def _median(row: dict[str, Any]) -> float:
    return row["images_per_second_median"]


def _peaks(found: dict[str, list[int]]) -> list[str]:
    """Measured MiB of each process, and predicted in parentheses."""
    measured = [f"{size / MIB:.1f}" if size else "" for size in found["measured"]]
    predicted = [f" ({size / MIB:.1f})" for size in found.get("predicted", [])]
    return [a + b for a, b in zip(measured, predicted or [""] * len(measured), strict=True)]


def _targets(result: dict[str, Any]) -> list[str]:
    """Targets that can be read off the rows that were run."""
    rate = {row["contender"]: _median(row) for row in result["rows"]}
    capacity = {row["contender"]: row["of_capacity"] for row in result["rows"]}
    two, four = (
        {name: found["measured"] for name, found in result["peak_live_bytes"].get(processes, {}).items()}
        for processes in ("2", "4")
    )
    m = result["settings"]["m"]
    low, high = m[0], m[-1]
    petra, plain = f"petra, k={high}", f"1F1B, m={high}"
    checks: list[tuple[str, str, Any]] = [
        ("petra over capacity", ">= 0.85", lambda: capacity[petra]),
        (f"petra over 1F1B, m={high}", ">= 1", lambda: rate[petra] / rate[plain]),
        (
            f"petra over 1F1B + checkpointing, m={low}",
            ">= 1.5",
            lambda: rate[f"petra, k={low}"] / rate[f"1F1B + checkpointing, m={low}"],
        ),
        ("delayed over capacity", ">= 0.95", lambda: capacity[f"delayed, k={high}"]),
        ("petra's tick over the slowest stage's compute", "<= 1.05", lambda: rate[without] / rate[petra]),
        (f"live bytes over 1F1B's, m={high}, rank 0", "<= 0.25", lambda: two[petra][0] / two[plain][0]),
        (f"live bytes over 1F1B's, m={high}, last rank", "<= 1.2", lambda: two[petra][-1] / two[plain][-1]),
        (f"largest rank of 4 over 1F1B's, m={high}", "<= 0.5", lambda: max(four[petra]) / max(four[plain])),
    ]
    without = f"petra without links, k={high}"
    lines = ["| target | wanted | found |", "|---|---|---|"]
    for name, wanted, ratio in checks:
        try:
            lines.append(f"| {name} | {wanted} | {ratio():.3f} |")
        except KeyError:  # a contender was left out of this run
            continue
    return lines


def _validation(result: dict[str, Any]) -> str:
    lines = [
        "# petra-zoo plan, predicted and measured",
        "",
        "Two gloo processes, network as in [benchmarks/pipeline](../pipeline/README.md). Profiles are measured in both "
        f"processes at once, one in each of {len(result['load_average'])} rounds, in which each method is measured as "
        "well; medians over the rounds. The link is measured by an exchange both ways of a message's size: "
        f"{result['link']['bandwidth'] / 1e9:.2f} GB/s each way, {result['link']['latency'] * 1e6:.0f} us.",
        "",
        "| method | units per stage | predicted images/s | measured | predicted over measured |",
        "|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        lines.append(
            f"| {row['method']}, m={row['micro_batches']} | {' + '.join(map(str, row['split']))} "
            f"| {row['predicted_images_per_second']:.1f} | {row['measured_images_per_second']:.1f} "
            f"| {row['predicted_over_measured']:.3f} |"
        )
    return "\n".join([*lines, "", *_footer(result)])


def _footer(result: dict[str, Any]) -> list[str]:
    load = result["load_average"] or [0.0]
    return [
        f"Machine: {result['machine']}; load average {min(load):.2f} to {max(load):.2f}, of which this run makes 2; "
        "versions " + ", ".join(f"{name} {number}" for name, number in result["versions"].items()) + ".",
        "",
        "```",
        result["command"],
        "```",
        "",
    ]


if __name__ == "__main__":
    here = Path(__file__).parent
    for folder in (here, here.parent / "plan"):
        if (folder / "results.json").exists():
            (folder / "README.md").write_text(markdown(json.loads((folder / "results.json").read_text())))
