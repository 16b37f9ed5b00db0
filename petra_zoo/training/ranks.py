"""What the processes of a run settle among themselves before and beside the training."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn

from petra_zoo.errors import UserError
from petra_zoo.petra import World, join
from petra_zoo.training.build import choose_device
from petra_zoo.training.recipe import Recipe

T = TypeVar("T")


class SharedError(UserError):
    """A user's mistake that every process raises: one of them saying it is enough."""


def enter(recipe: Recipe) -> World:
    """Joins the processes of this run, and makes sure that all of them mean the same one.

    Raises:
        UserError: they cannot find each other, do not fit the recipe, or have different recipes.
    """
    device = choose_device(recipe.device)
    try:
        world = join(device, recipe.data_parallel)
    except ValueError as error:
        raise UserError(str(error)) from error
    settings = world.gather((torch.get_num_threads(), recipe.model_dump(mode="json")))
    threads, first = settings[0]
    for rank, (its_threads, other) in enumerate(settings):
        for key, value in first.items():
            if other[key] != value:
                raise SharedError(
                    f"ranks disagree on the recipe: {key} is {value!r} on rank 0 and {other[key]!r} on rank {rank}; "
                    "launch all of them with the same recipe and overrides"
                )
        if its_threads != threads:
            raise SharedError(
                f"ranks disagree on the number of threads: {threads} on rank 0 and {its_threads} on rank {rank}; "
                "set OMP_NUM_THREADS to the same number for all of them"
            )
    return world


def together(world: World, prepare: Callable[[], T]) -> T:
    """Calls a function in every process; where it finds a user's mistake in one, all of them raise it.

    Raises:
        UserError: the first rank's that has one.
    """
    found: UserError | None = None
    try:
        result = prepare()
    except UserError as error:
        found = error
    mistakes = [mistake for mistake in world.gather(str(found) if found else None) if mistake]
    if mistakes:
        raise SharedError(mistakes[0]) from found
    return result


def synchronize_statistics(model: nn.Module, world: World) -> nn.Module:
    """Turns batch norms into torch's synchronised ones, over the replicas of each rank.

    Raises:
        UserError: not on CUDA, where torch has none.
    """
    if world.device.type != "cuda":
        raise UserError("sync_bn=true: torch synchronises batch norms on CUDA only; leave it out, or use group norm")
    synchronized: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(model, world.across)
    return synchronized


def average_statistics(model: nn.Module, world: World) -> None:
    """Averages running statistics over the replicas, whose batch norms have seen different images."""
    if world.across is None:
        return
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")) and not buffer.is_meta:
            dist.all_reduce(buffer, group=world.across)
            buffer /= world.replicas
