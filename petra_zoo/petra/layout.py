"""The layout of a pipeline: a model's units in stages, the stages on ranks.

Delays follow the stages, balance follows the ranks: a rank takes as long as its stages together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from petra_zoo.errors import UserError
from petra_zoo.petra.counting import Size, count_operations, input_size_of, required_input_size
from petra_zoo.petra.methods import Method, find_method
from petra_zoo.petra.profile import Profile
from petra_zoo.petra.unit_profile import FORWARDS
from petra_zoo.reversible import UnitModel, units_of

Speeds = tuple[float, ...]


def consecutive(sizes: Sequence[int]) -> list[range]:
    """Consecutive ranges of these sizes, from 0."""
    return [range(a, b) for a, b in pairwise([0, *accumulate(sizes)])]


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
        UserError: more stages than costs, or lists whose lengths do not fit.
    """
    n = len(costs)
    speed = [1.0] * stages if device_speed is None else list(device_speed)
    last_costs = [c * last_stage_discount for c in costs] if last_stage_costs is None else list(last_stage_costs)
    if not 1 <= stages <= n:
        raise UserError(f"{stages} stages do not fit {n} units: choose 1 to {n}")
    if len(speed) != stages or not all(s > 0 for s in speed):
        raise UserError(f"device_speed={speed} must be {stages} positive numbers, one for each stage")
    if len(last_costs) != n:
        raise UserError(f"{len(last_costs)} last-stage costs for {n} units")
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
        UserError: more ranks than stages, or not one speed per rank.
    """
    if not 1 <= ranks <= len(stage_costs):
        raise UserError(f"{ranks} ranks for {len(stage_costs)} stages: choose 1 to {len(stage_costs)}")
    return consecutive(balance(stage_costs, ranks, 1.0, device_speed=device_speed))


@dataclass(frozen=True)
class Costs:
    """Cost of each unit in any stage but the last, and in the last one, which may keep its graph."""

    each: Sequence[float]
    in_last: Sequence[float]

    def of_stages(self, stages: Sequence[range]) -> list[float]:
        """Cost of each stage, given its units."""
        *rest, last = stages
        return [sum(self.each[i] for i in owned) for owned in rest] + [sum(self.in_last[i] for i in last)]

    @classmethod
    def measured(cls, profile: Profile, method: str | Method = "petra") -> Costs:
        """Seconds that a profile gives each unit."""
        return cls(profile.costs(method), profile.costs(method, last_stage=True))

    @classmethod
    def counted(cls, model: UnitModel, input_size: Size, method: str | Method = "petra") -> Costs:
        """Operations of each unit: those of a forward, and less in a last stage that need not recompute."""
        found = find_method(method)
        counts, discount = count_operations(model, input_size), FORWARDS[found.last_work] / FORWARDS[found.work]
        return cls(counts, [count * discount for count in counts])


def check_ranks(ranks: int, stages: int) -> None:
    """Refuses more processes than stages.

    Raises:
        UserError: says how many can be launched.
    """
    if ranks > stages:
        plural = "s" if stages > 1 else ""
        raise UserError(
            f"{ranks} processes for {stages} stage{plural}: launch 1 to {stages}, or set stages={ranks} or more"
        )


@dataclass(frozen=True)
class Layout:
    """Units -> stages -> ranks, fixed before training begins.

    Attributes:
        stages: the units of each stage.
        ranks: the stages of each rank.
        costs: those that it was balanced by, where they were known.
        device_speed: of each rank's device, relative to each other.
        input_size: [C, H, W] of an image, where it was given.
    """

    stages: tuple[range, ...]
    ranks: tuple[range, ...]
    costs: Costs | None = None
    device_speed: Speeds | None = None
    input_size: Size | None = None

    @classmethod
    def of(
        cls,
        model: UnitModel,
        layout: int | Sequence[int] | Layout,
        *,
        method: str | Method = "petra",
        ranks: int = 1,
        costs: Costs | None = None,
        input_size: Size | None = None,
        device_speed: Sequence[float] | None = None,
    ) -> Layout:
        """What people write for a layout: J stages whose slowest is as fast as can be; or units per stage.

        Args:
            model: whose units are cut.
            layout: J; or the sizes of the stages; or a layout, which must fit.
            method: what the stages will do with the units.
            ranks: processes to spread the stages over.
            costs: of the units; default: their operations are counted, which is the same on every machine.
            input_size: [C, H, W] of an image, for counting; default: the model's pretrained_cfg.
            device_speed: of each rank's device, relative to each other.

        Raises:
            UserError: it does not fit the model, or there are more ranks than stages; says how many would do.
        """
        units = len(units_of(model))
        if isinstance(layout, Layout):
            return layout._checked(units, ranks)
        _check_fits(layout, units)
        speeds, stages = _speeds(device_speed, ranks), layout if isinstance(layout, int) else len(layout)
        balances = isinstance(layout, int) and 1 < stages < units
        if costs is None:
            costs = _counted(model, method, input_size, ranks, needed=balances or 1 < ranks < stages)
        if not isinstance(layout, int):
            sizes = list(layout)
        elif balances:
            assert costs is not None
            of_stages = speeds if stages == ranks else None  # else a stage does not know its device yet
            sizes = balance(costs.each, stages, last_stage_costs=costs.in_last, device_speed=of_stages)
        else:
            sizes = [units // stages] * stages
        return cls._of_sizes(sizes, ranks, costs, speeds, input_size)

    def _checked(self, units: int, ranks: int) -> Layout:
        mine, over = sum(self.sizes), len(self.ranks)
        if mine != units or over != ranks:
            raise UserError(
                f"the layout is of {mine} units on {over} ranks, but the model has {units} units and there are {ranks} "
                f"ranks: make it with this model and ranks={ranks}"
            )
        return self

    @classmethod
    def _of_sizes(
        cls, sizes: Sequence[int], ranks: int, costs: Costs | None, speeds: Speeds | None, input_size: Size | None
    ) -> Layout:
        stages = consecutive(sizes)
        n = len(stages)
        check_ranks(ranks, n)
        if ranks in (1, n):
            owned = consecutive([n // ranks] * ranks)
        else:
            assert costs is not None
            owned = assign_stages(costs.of_stages(stages), ranks, speeds)
        return cls(tuple(stages), tuple(owned), costs, speeds, input_size)

    @property
    def sizes(self) -> list[int]:
        """Units of each stage."""
        return [len(owned) for owned in self.stages]

    def units_of_rank(self, rank: int) -> range:
        """The units of a rank's stages: those of consecutive stages are consecutive."""
        owned = self.ranks[rank]
        return range(self.stages[owned[0]].start, self.stages[owned[-1]].stop)

    def stage_of(self, unit: int) -> int:
        """The stage that has a unit."""
        return next(j for j, owned in enumerate(self.stages) if unit in owned)

    def loads(self) -> list[float]:
        """Each rank's work per micro-batch relative to the busiest rank's, by the costs that balanced the stages.

        Raises:
            UserError: nobody knows the costs: no input size was given, and none was needed.
        """
        if len(self.ranks) == 1:
            return [1.0]
        if self.costs is None:
            raise UserError("loads are not known without costs: give the layout costs, or input_size=(C, H, W)")
        of_stages = self.costs.of_stages(self.stages)
        speeds = self.device_speed or [1.0] * len(self.ranks)
        seconds = [sum(of_stages[j] for j in owned) / s for owned, s in zip(self.ranks, speeds, strict=True)]
        return [x / max(seconds) for x in seconds]

    def efficiency(self, delayed: bool = True) -> float:
        """Predicted share of the ranks' time that is spent computing: messages are hidden, ranks wait.

        Args:
            delayed: whether all ranks work at once, as under a method with delay, or one after the other.
        """
        loads = self.loads()
        return sum(loads) / len(loads) if delayed else 1.0 / len(loads)


def _check_fits(layout: int | Sequence[int], units: int) -> None:
    if isinstance(layout, int):
        if not 1 <= layout <= units:
            raise UserError(f"stages={layout} does not fit a model of {units} units: choose 1 to {units}")
    elif any(n < 1 for n in layout) or sum(layout) != units:
        raise UserError(
            f"split={list(layout)} must be positive and add up to the model's {units} units, not {sum(layout)}"
        )


def _speeds(given: Sequence[float] | None, ranks: int) -> Speeds | None:
    if given is not None and len(given) != ranks:
        raise UserError(f"device_speed={list(given)} must give one speed for each of {ranks} processes")
    return None if given is None else tuple(given)


def _counted(model: UnitModel, method: str | Method, input_size: Size | None, ranks: int, needed: bool) -> Costs | None:
    """Costs by operation count: where they decide, and where several ranks want to know their loads."""
    if needed:
        input_size = required_input_size(model, input_size, instead=", or the number of units of each stage")
    size = input_size_of(model, input_size) if needed or ranks > 1 else None
    return None if size is None else Costs.counted(model, size, method)
