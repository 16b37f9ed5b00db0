"""Which of timm's families have chains of blocks that can be made reversible; see `benchmarks/families`."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable

from petra_zoo.bench.markdown import cell, markdown_table
from petra_zoo.bench.results import Record, Results
from petra_zoo.strict_json import Json, JsonObject

SERVED, OWN, LOOP, FAR, NONE, BROKEN = "served", "of its own", "one by one", "replaces", "no chain", "failed"
# How a network is judged by its chains, as tables call it.
WHY = {
    SERVED: "make_reversible replaces the containers",
    OWN: "the network calls its blocks one by one, and has a reversible one of its own",
    LOOP: "the network calls its blocks one by one",
    FAR: "its blocks replace their input",
    NONE: "no three blocks keep their shape",
    BROKEN: "the network could not be watched",
}


def families_tables(results: Results) -> dict[str, str]:
    """`families`: a row per family of timm's; `totals`: names by what becomes of them; `unchecked`: blocks."""
    networks = [run for run in results.runs if run.settings.get("of") == "network"]
    blocks = [run for run in results.runs if run.settings.get("of") == "block"]
    differences = {run.contender: run.number("difference") for run in blocks if run.failed is None}
    by_family: dict[str, list[Record]] = defaultdict(list)
    for run in networks:
        by_family[str(run.result.get("family"))].append(run)
    totals = results.about.get("names")
    counts = totals if isinstance(totals, dict) else {}
    judged = [_judged(run) for run in networks]
    outcomes = [what for what in WHY if what != BROKEN or BROKEN in judged]
    rows = [_row(family, by_family[family], counts.get(family), differences, outcomes) for family in sorted(by_family)]
    columns = ["family", "names", *outcomes, "blocks", "longest run", "activations inside", "gradients off by"]
    return {
        "families": markdown_table(columns, rows),
        "totals": markdown_table(
            ["what becomes of it", "names"],
            [[WHY[what], str(judged.count(what))] for what in outcomes],
        ),
        "unchecked": markdown_table(
            ["block", "of", "why its gradients were not compared"],
            [[run.contender, str(run.settings.get("network")), run.failed] for run in blocks if run.failed is not None],
        ),
    }


def _row(family: str, runs: list[Record], names: Json, differences: dict[str, float], outcomes: list[str]) -> list[str]:
    judged = [_judged(run) for run in runs]
    served = [run for run in runs if _judged(run) == SERVED]
    chains = [chain for run in runs for chain in _chains(run) if _longest([chain]) >= 3 and not chain.get("far")]
    kinds = dict.fromkeys(kind for chain in chains for kind in _texts(chain.get("kinds")))
    off = [differences[block] for chain in chains if (block := str(chain.get("block"))) in differences]
    share = [run.number("activations_covered") for run in served]
    return [
        family,
        str(len(runs)) if names in (None, len(runs)) else f"{len(runs)} of {names}",
        *(str(judged.count(what) or "") for what in outcomes),
        ", ".join(kinds),
        str(_longest(chains) or ""),
        cell(statistics.median(share), 2) if share else "",
        f"{max(off):.0e}" if off else "",
    ]


def _judged(run: Record) -> str:
    if run.failed is not None:
        return BROKEN
    chains = [chain for chain in _chains(run) if _longest([chain]) >= 3]
    if any(not chain.get("far") and not chain.get("one_by_one") for chain in chains):
        return SERVED
    if any(chain.get("one_by_one") for chain in chains):
        return OWN if run.result.get("twin") else LOOP
    return FAR if chains else NONE


def _chains(run: Record) -> list[JsonObject]:
    chains = run.result.get("chains")
    return [chain for chain in chains if isinstance(chain, dict)] if isinstance(chains, list) else []


def _longest(chains: Iterable[JsonObject]) -> int:
    runs = [chain.get("runs") for chain in chains]
    return max(
        (length for run in runs if isinstance(run, list) for length in run if isinstance(length, int)), default=0
    )


def _texts(value: Json) -> list[str]:
    return [str(x) for x in value] if isinstance(value, list) else []
