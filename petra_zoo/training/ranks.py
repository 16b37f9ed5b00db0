"""What the processes of a run settle among themselves before and beside the training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn

from petra_zoo.device import choose_device
from petra_zoo.errors import Failure, UserError
from petra_zoo.petra import World, join
from petra_zoo.petra.process_links import wait_for
from petra_zoo.settings.recipe import Recipe

T = TypeVar("T")
HELD_TAG = 192  # apart from the links' messages and those of `petra_zoo.petra.gather`
LONGEST_VALIDATION = timedelta(days=7)  # links notice a lost rank much earlier


class SharedError(UserError):
    """A user's mistake that every process raises: one of them saying it is enough."""


class SharedFailure(Failure):
    """A failure that every process raises behind the same tick: one of them saying it is enough."""


def enter(recipe: Recipe) -> World:
    """Joins the processes of this run, and makes sure that all of them mean the same one.

    Raises:
        UserError: they cannot find each other, do not fit the recipe, or have different recipes.
    """
    device = choose_device(recipe.device)
    world = join(device, recipe.data_parallel)
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


def average_statistics(model: nn.Module, world: World) -> None:
    """Averages running statistics over the replicas, whose batch norms have seen different images.

    Every process meets the others first: ranks of a pipeline end an epoch one after the other, and one that waited in
    here for its twin would keep its neighbours waiting for messages.
    """
    if world.across is None:
        return
    world.gather(None)
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")) and not buffer.is_meta:
            dist.all_reduce(buffer, group=world.across)
            buffer /= world.replicas


@contextmanager
def held(world: World) -> Iterator[None]:
    """What the first replica does in here, the others wait for at the end, however long it takes.

    Else they would train on until an update needs the first replica's gradients, and those of their ranks that need
    them later would wait for a message longer than one may take. Where the first replica fails, its connections break
    and the waiting ends.

    Raises:
        LinkError: the first replica's rank has gone.
    """
    yield
    if world.across is None:
        return
    first, word = dist.get_global_rank(world.across, 0), torch.zeros(1)
    what = f"rank {dist.get_rank()} waits for rank {first} to validate"
    if world.replica > 0:
        wait_for(dist.irecv(word, first, world.across, HELD_TAG), LONGEST_VALIDATION, what)
        return
    for replica in range(1, world.replicas):
        other = dist.get_global_rank(world.across, replica)
        wait_for(dist.isend(word, other, world.across, HELD_TAG), LONGEST_VALIDATION, f"rank {other} has not waited")
