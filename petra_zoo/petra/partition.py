"""Partition of a model's units into stages."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from petra_zoo.reversible import Streams, Unit

# Cost of a micro-batch in forwards of a unit: forward 1, recomputation 1, backward 2; the last stage keeps its graph.
COST = 4.0
COST_WITHOUT_RECOMPUTATION = 3.0


def count_operations(model: Any, input_size: tuple[int, int, int]) -> list[float]:
    """Floating-point operations of each unit's forward for one image, counted on the meta device.

    Counts matrix products and convolutions (torch's FlopCounterMode), so it is the same on every machine.

    Args:
        model: a model with `units()`.
        input_size: [C, H, W] of an image.
    """
    units, streams = on_meta(model, input_size)
    operations = []
    with torch.no_grad():
        for unit in units:
            with FlopCounterMode(display=False) as counter:
                streams = unit(*streams)
            operations.append(float(counter.get_total_flops()))
    return operations


def on_meta(model: Any, input_size: tuple[int, int, int]) -> tuple[list[Unit], Streams]:
    """Units of a copy of the model on the meta device, in eval mode, and one image [1, C, H, W] for the first."""
    model = copy.deepcopy(model).to("meta").eval()
    for module in model.modules():  # a user's hooks are for the model's own forward
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return model.units(), (torch.empty(1, *input_size, device="meta", dtype=next(model.parameters()).dtype),)


def balance(
    costs: Sequence[float],
    stages: int,
    last_stage_discount: float = 0.75,
    *,
    last_stage_costs: Sequence[float] | None = None,
    device_speed: Sequence[float] | None = None,
) -> list[int]:
    """Splits units into consecutive stages so that the slowest stage is as fast as can be.

    Args:
        costs: cost of each unit, in order.
        stages: number of stages J, at most the number of units.
        last_stage_discount: cost of a unit in the last stage relative to another stage (3/4 where it keeps its graph).
        last_stage_costs: cost of each unit in the last stage where it was measured, instead of the discount.
        device_speed: of each stage's device, relative to each other; a stage takes its cost over that.

    Returns:
        Units per stage. Of equally good partitions the one whose early stages are smallest: they have most in flight.

    Raises:
        ValueError: more stages than costs, or lists whose lengths do not fit.
    """
    n = len(costs)
    speed = [1.0] * stages if device_speed is None else list(device_speed)
    last_costs = [c * last_stage_discount for c in costs] if last_stage_costs is None else list(last_stage_costs)
    if not 1 <= stages <= n:
        raise ValueError(f"{stages} stages do not fit {n} units: choose 1 to {n}")
    if len(speed) != stages or not all(s > 0 for s in speed):
        raise ValueError(f"device_speed={speed} must be {stages} positive numbers, one for each stage")
    if len(last_costs) != n:
        raise ValueError(f"{len(last_costs)} last-stage costs for {n} units")
    total = [0.0, *accumulate(costs)]
    # best[j][i]: (slowest stage, partition) of units i.. in the last j stages
    best: list[list[tuple[float, tuple[int, ...]]]] = [[], []]
    best[1] = [(sum(last_costs[i:]) / speed[-1], (n - i,)) for i in range(n)]
    for j in range(2, stages + 1):
        row = []
        for i in range(n - j + 1):
            row.append(
                min(
                    (max((total[k] - total[i]) / speed[-j], best[j - 1][k][0]), (k - i, *best[j - 1][k][1]))
                    for k in range(i + 1, n - j + 2)
                )
            )
        best.append(row)
    return list(best[stages][0][1])


def assign_stages(stage_costs: Sequence[float], ranks: int, device_speed: Sequence[float] | None = None) -> list[range]:
    """Gives each rank consecutive stages so that the slowest rank (its stages' sum over its speed) is fastest.

    Args:
        stage_costs: cost of each stage, in order, the last one's own cost included.
        ranks: number of ranks, at most the number of stages.
        device_speed: of each rank's device.

    Returns:
        The stages of each rank.

    Raises:
        ValueError: more ranks than stages, or not one speed per rank.
    """
    if not 1 <= ranks <= len(stage_costs):
        raise ValueError(f"{ranks} ranks for {len(stage_costs)} stages: choose 1 to {len(stage_costs)}")
    bounds = [0, *accumulate(balance(stage_costs, ranks, 1.0, device_speed=device_speed))]
    return [range(a, b) for a, b in pairwise(bounds)]


@dataclass(frozen=True)
class Costs:
    """Cost of each unit in any stage but the last, and in the last one (which may keep its graph)."""

    each: Sequence[float]
    in_last: Sequence[float]

    def of_stages(self, partition: Sequence[range]) -> list[float]:
        """Cost of each stage of a partition."""
        *rest, last = partition
        return [sum(self.each[i] for i in owned) for owned in rest] + [sum(self.in_last[i] for i in last)]


def counted_costs(model: Any, input_size: tuple[int, int, int] | None, last_stage_discount: float) -> Costs:
    """Costs by operation count.

    Raises:
        ValueError: nobody says the input size.
    """
    size = input_size or getattr(model, "pretrained_cfg", {}).get("input_size")
    if size is None:
        raise ValueError("the model does not say its input size: give input_size=(C, H, W), or split=[...]")
    counts = count_operations(model, tuple(size))
    return Costs(counts, [count * last_stage_discount for count in counts])


def partition(
    units: int,
    stages: int | None,
    split: Sequence[int] | None,
    costs: Callable[[], Costs],
    device_speed: Sequence[float] | None = None,
) -> list[range]:
    """The units of each stage, given (`split`) or balanced (`stages`).

    Args:
        units: how many units there are.
        stages: J.
        split: units per stage.
        costs: asked only where it matters.
        device_speed: of each stage's device.

    Raises:
        ValueError: more stages than units, a split that does not fit, or neither of the two.
    """
    if split is not None:
        if stages is not None and stages != len(split):
            raise ValueError(f"split={list(split)} has {len(split)} stages, but stages={stages}: give one of them")
        if any(n < 1 for n in split) or sum(split) != units:
            raise ValueError(
                f"split={list(split)} must be positive and add up to the model's {units} units, not {sum(split)}"
            )
        sizes = list(split)
    elif stages is None:
        raise ValueError("give stages=J, or split=[units per stage]")
    elif not 1 <= stages <= units:
        raise ValueError(f"stages={stages} does not fit a model of {units} units: choose 1 to {units}")
    elif stages == units:
        sizes = [1] * units
    else:
        found = costs()
        sizes = balance(found.each, stages, last_stage_costs=found.in_last, device_speed=device_speed)
    bounds = [0, *accumulate(sizes)]
    return [range(a, b) for a, b in pairwise(bounds)]


def owners(
    partition: Sequence[range], ranks: int, costs: Callable[[], Costs], device_speed: Sequence[float] | None = None
) -> list[range]:
    """The stages of each rank.

    Raises:
        ValueError: more ranks than stages; says how many would do.
    """
    stages = len(partition)
    if ranks > stages:
        raise ValueError(
            f"{ranks} processes for {stages} stage{'s' if stages > 1 else ''}: launch 1 to {stages}, or set "
            f"stages={ranks} or more"
        )
    if ranks in (1, stages):
        return [range(stages)] if ranks == 1 else [range(j, j + 1) for j in range(stages)]
    return assign_stages(costs().of_stages(partition), ranks, device_speed)
