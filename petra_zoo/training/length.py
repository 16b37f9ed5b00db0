"""How long a run is, once the data is known: in epochs, in micro-batches, and for the schedule of the learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass

from petra_zoo.errors import UserError
from petra_zoo.settings.length import check_patience
from petra_zoo.settings.recipe import Recipe
from petra_zoo.wording import counted


@dataclass(frozen=True)
class Length:
    """How long a run is.

    Attributes:
        batches: micro-batches of a whole epoch, of one replica.
        epochs: that are begun; the last one may end early.
        total: micro-batches of all of them.
        ended: why a run of it ends.
    """

    batches: int
    epochs: int
    total: int
    ended: str

    @classmethod
    def of(cls, recipe: Recipe, batches: int) -> Length:
        """Of a recipe, on data with so many micro-batches per epoch."""
        if recipe.total_epochs is not None:
            epochs = recipe.total_epochs
            return cls(batches, epochs, epochs * batches, f"all {counted(epochs, 'epoch')}")
        assert recipe.max_updates is not None
        total = recipe.max_updates * recipe.accumulation_steps
        return cls(batches, math.ceil(total / batches), total, f"max_updates={recipe.max_updates}")

    def fed_in(self, epoch: int) -> int:
        """Micro-batches of an epoch, counted from 0."""
        return min(self.batches, self.total - epoch * self.batches)

    def place_after(self, epoch: int) -> tuple[int, int]:
        """Where a run is behind an epoch: in which one, and how many micro-batches of it have been fed."""
        fed = self.fed_in(epoch)
        return (epoch + 1, 0) if fed == self.batches else (epoch, fed)

    def is_over(self, epoch: int, batch: int, *, finished: bool) -> bool:
        """Whether nothing is left at a place; at the very end, a run that has not `finished` has yet to validate."""
        fed = epoch * self.batches + batch
        return epoch >= self.epochs or fed > self.total or (finished and fed == self.total)


def check_run_length(recipe: Recipe, batches: int) -> None:
    """Refuses `max_updates` by which there is nothing to train, or patience that can end nothing.

    Raises:
        UserError: says what to change.
    """
    if recipe.max_updates is None:
        return
    beside = updates_in(recipe, batches, recipe.epochs_beside)
    if beside >= recipe.max_updates:
        raise UserError(
            f"max_updates={recipe.max_updates}, but cooldown_epochs and the warm-up of warmup_prefix take {beside} "
            f"updates; expected more than that, or fewer such epochs"
        )
    try:
        check_patience(recipe.patience, recipe.val_interval, Length.of(recipe, batches).epochs)
    except ValueError as error:
        raise UserError(str(error)) from error


def say_length(recipe: Recipe) -> str:
    """How long a run is, for people."""
    if recipe.total_epochs is not None:
        return counted(recipe.total_epochs, "epoch")
    assert recipe.max_updates is not None
    return counted(recipe.max_updates, "update")


def warn_of_warm_up(recipe: Recipe, batches: int) -> str | None:
    """What is to be said where updates are so few that the learning rate never gets to its height."""
    warm_up = updates_in(recipe, batches, recipe.warmup_epochs)
    if recipe.max_updates is None or recipe.sched == "none" or warm_up < recipe.max_updates:
        return None
    return (
        f"max_updates={recipe.max_updates} ends within the warm-up, warmup_epochs={recipe.warmup_epochs} of "
        f"{counted(updates_in(recipe, batches), 'update')}: the learning rate does not reach its height"
    )


def updates_in(recipe: Recipe, batches: int, epochs: float = 1) -> int:
    """As schedules count them: a window runs on over an epoch's end, and one that the run's end cuts is an update."""
    return math.ceil(epochs * batches / recipe.accumulation_steps)
