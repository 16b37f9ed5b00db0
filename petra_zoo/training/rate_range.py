"""A learning-rate range test: what becomes of the loss while the rate grows from far too small to far too large.

L. N. Smith, "Cyclical Learning Rates for Training Neural Networks", section 3.3 (arXiv 1506.01186). Rates grow
exponentially, as in fastai's `lr_find`, and the suggestion is by its rule `steep`: where the loss falls fastest.

In a pipeline the gradients of the first stage are 2 (J - 1) ticks late, and a micro-batch whose loss is seen now was
fed J - 1 ticks ago. So a rate is held for whole windows, and only losses at its end count: each is of a micro-batch
that was fed when all stages had made an update at this rate, and seen more than 2 (J - 1) ticks after it was set.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.optim import Optimizer

from petra_zoo.device import choose_device, computing
from petra_zoo.errors import UserError
from petra_zoo.figures import new_figure, save_figure
from petra_zoo.petra import NotFiniteError, Pipeline, World
from petra_zoo.petra.optimization import State
from petra_zoo.progress import tracked
from petra_zoo.settings.recipe import Recipe
from petra_zoo.strict_json import JsonObject
from petra_zoo.training.endings import Divergence
from petra_zoo.training.preparation import Prepared, prepare
from petra_zoo.training.progress import Reporter
from petra_zoo.training.run import Run
from petra_zoo.training.threads import threads_restored

RULE = "where the smoothed loss falls fastest (the rule `steep` of fastai's lr_find, for the test of arXiv 1506.01186)"
UPDATES = 8  # of each rate, where the pipeline does not ask for more
_SMOOTHED = 2  # neighbours on each side
_FALLEN = 0.98  # of the first loss: less than that is noise


@dataclass(frozen=True)
class Hold:
    """How long a rate is held, in ticks.

    Attributes:
        fill: in front of the first rate: until the first gradients are at the first stage.
        wait: before losses count; whole windows.
        count: whose losses count; whole windows, at least one.
    """

    fill: int
    wait: int
    count: int

    @classmethod
    def of(cls, pipeline: Pipeline, updates: int) -> Hold:
        """For a pipeline, with so many updates at each rate or more; without delay, one of them before losses count."""
        k = pipeline.optimization.accumulation_steps
        up = len(pipeline.layout.stages) - 1 if pipeline.method.delayed else 0
        wait = _whole_windows(max(2 * up, k + up), k)
        return cls(fill=_whole_windows(2 * up, k), wait=wait, count=max(k, updates * k - wait))

    @property
    def ticks(self) -> int:
        """Of each rate."""
        return self.wait + self.count


class HeldRates:
    """A schedule: rate after rate, each for so many updates. Scaled layer by layer as timm's schedules do it.

    Args:
        optimizer: of a stage.
        rates: in their order.
        fill: updates in front of the first, at its rate.
        updates: of each.
    """

    def __init__(self, optimizer: Optimizer, rates: Sequence[float], fill: int, updates: int) -> None:
        self.optimizer, self.rates, self.fill, self.updates = optimizer, rates, fill, updates
        self.step_update(0)

    def step_update(self, num_updates: int) -> None:
        """Sets the rate behind so many updates."""
        number = max(0, num_updates - self.fill) // self.updates
        rate = self.rates[min(number, len(self.rates) - 1)]
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)

    def state_dict(self) -> State:
        """Nothing: it goes by the number of updates."""
        return {}

    def load_state_dict(self, state_dict: State) -> None:
        """Takes nothing."""


@dataclass(frozen=True)
class RateRange:
    """What came out.

    Attributes:
        rates, losses: of every rate that was held to its end.
        smoothed: means of a loss and its neighbours, two on either side.
        lowest: the rate at which that is lowest; None where there is no such minimum.
        suggestion: the rate up to there at which it falls fastest, to two digits; likewise.
        rule: what it goes by, or why there is none.
        held, counted: ticks of each rate, and those at its end whose losses count.
        diverged: whether larger rates were left out, for the loss had run away.
    """

    rates: list[float]
    losses: list[float]
    smoothed: list[float]
    lowest: float | None
    suggestion: float | None
    rule: str
    held: int
    counted: int
    diverged: bool

    @classmethod
    def of(cls, rates: Sequence[float], losses: Sequence[float], hold: Hold, *, diverged: bool) -> RateRange:
        """From the losses, which may be fewer than the rates."""
        smoothed = smooth(losses)
        found = range_of(smoothed, diverged=diverged)
        lowest, suggestion = None, None
        if isinstance(found, int):
            lowest, rule = rates[found], RULE
            suggestion = float(f"{rates[steepest(smoothed[: found + 1])]:.2g}")
        else:
            rule = found
        held = list(rates[: len(losses)])
        return cls(held, list(losses), smoothed, lowest, suggestion, rule, hold.ticks, hold.count, diverged)

    def as_dict(self) -> JsonObject:
        """For JSON."""
        return asdict(self)


def smooth(losses: Sequence[float]) -> list[float]:
    """The mean of each loss and its neighbours: as it stands in the middle, it moves no minimum to larger rates."""
    windows = (losses[max(0, i - _SMOOTHED) : i + _SMOOTHED + 1] for i in range(len(losses)))
    return [sum(window) / len(window) for window in windows]


def range_of(smoothed: Sequence[float], *, diverged: bool) -> int | str:
    """Where the lowest loss is, or why there is no minimum to go by."""
    if len(smoothed) < 2 * _SMOOTHED + 1:
        return "the loss runs away at once: begin with a smaller rate (--from)"
    lowest = min(range(len(smoothed)), key=smoothed.__getitem__)
    if smoothed[lowest] > _FALLEN * smoothed[0]:
        return (
            "the smoothed loss has not fallen at any rate: try more rates (--rates), hold each for longer (--updates), "
            "or look at the recipe"
        )
    if lowest == len(smoothed) - 1 and not diverged:
        return "the loss still falls at the largest rate: go on to larger ones (--to)"
    return lowest


def steepest(smoothed: Sequence[float]) -> int:
    """Where a curve over rates of equal ratio falls fastest, by the difference of its neighbours."""
    inner = range(1, len(smoothed) - 1)
    return min(inner, key=lambda i: smoothed[i + 1] - smoothed[i - 1], default=len(smoothed) - 1)


def exponential(lowest: float, highest: float, count: int) -> list[float]:
    """Rates of equal ratio, both ends included.

    Raises:
        UserError: there is no such range.
    """
    if not 0 < lowest < highest < math.inf:
        raise UserError(f"rates from {lowest:g} to {highest:g}: expected two above 0, the smaller one first")
    return [lowest * (highest / lowest) ** (i / (count - 1)) for i in range(count)]


@threads_restored()
def try_rates(recipe: Recipe, rates: Sequence[float], updates: int = UPDATES) -> RateRange:
    """Trains in this process, at one rate after the other, and writes nothing.

    Args:
        recipe: of which all but the learning rate and its schedule holds.
        rates: in their order.
        updates: at each of them, or more where the delay takes them.

    Raises:
        UserError: settings, data or devices do not allow it.
    """
    if recipe.data_parallel > 1:
        raise UserError(
            f"data_parallel={recipe.data_parallel}: rates are tried in one process; set data_parallel=1 "
            f"update_size={recipe.images_per_update} for as many images per update"
        )
    # One that is not finite ends the test; nothing else is measured or averaged beside it.
    plain = {"model_ema": False, "on_nonfinite": "stop", "on_divergence": "stop", "drift_every": None}
    device = choose_device(recipe.device)
    with computing(device, deterministic=recipe.deterministic, tf32=recipe.tf32):
        prepared = prepare(recipe.model_copy(update={**plain, "device_speed": None}), world=World(device=device))
        hold = Hold.of(prepared.pipeline, updates)
        losses, diverged = _losses(prepared, rates, hold)
    return RateRange.of(rates, losses, hold, diverged=diverged)


def _losses(prepared: Prepared, rates: Sequence[float], hold: Hold) -> tuple[list[float], bool]:
    """The loss at each rate, and whether it ran away before the last."""
    run, k = Run(prepared, Reporter(quiet=True)), prepared.recipe.accumulation_steps
    for stage in prepared.pipeline.stages:
        if stage.optimizer is not None:
            stage.scheduler = HeldRates(stage.optimizer, rates, hold.fill // k, hold.ticks // k)
    watch = Divergence(prepared.recipe, prepared.model.num_classes)
    batches, losses = prepared.endless(), list[float]()
    prepared.model.train()

    def ticks(count: int) -> list[torch.Tensor]:
        outputs = [run.step(*next(batches)) for _ in range(count)]
        return [output.loss for output in outputs if output.loss is not None]

    try:
        ticks(hold.fill)
        for _ in tracked(rates, "trying rates", len(rates)):
            ticks(hold.wait)
            losses.append(float(torch.stack(ticks(hold.count)).mean()))
            watch.start = losses[0]
            watch.saw(losses[-1])
            if watch.found:
                return losses, True
        run.finite.settle()
    except NotFiniteError:
        return [loss for loss in losses if math.isfinite(loss)], True
    return losses, False


def draw_rates(found: RateRange, output: Path, title: str) -> None:
    """The curve, with what is suggested.

    Raises:
        UserError: matplotlib is missing, or the picture cannot be written.
    """
    figure = new_figure(8, 5)
    axes = figure.subplots()
    axes.plot(found.rates, found.losses, color="C0", linewidth=1.0, alpha=0.55, label="loss at a rate")
    axes.plot(found.rates, found.smoothed, color="C0", linewidth=1.8, label="smoothed")
    if found.lowest is not None and found.suggestion is not None:
        axes.axvline(found.lowest, color="C7", linewidth=1.0, linestyle=":", label=f"lowest, {found.lowest:.2g}")
        axes.axvline(found.suggestion, color="C1", linewidth=1.5, label=f"suggested, {found.suggestion:g}")
    axes.set_xscale("log")
    if found.losses:  # what has run away would press all else to the bottom
        axes.set_ylim(bottom=min(0.0, *found.losses), top=min(1.05 * max(found.losses), 2 * found.losses[0]))
    axes.set_xlabel("learning rate")
    axes.set_ylabel("loss")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    save_figure(figure, output)


def _whole_windows(ticks: int, k: int) -> int:
    return k * math.ceil(ticks / k)
