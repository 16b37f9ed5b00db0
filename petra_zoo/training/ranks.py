"""What the processes of a run settle among themselves before and beside the training."""

from __future__ import annotations

import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn

from petra_zoo.device import choose_device
from petra_zoo.errors import Failure, UserError
from petra_zoo.petra import World, join
from petra_zoo.petra.placement import PlacementError
from petra_zoo.petra.waiting import wait_for
from petra_zoo.petra.window import Averaging
from petra_zoo.settings.recipe import Recipe

T = TypeVar("T")
SEEN_WITHIN = 5.0  # seconds, in which a network's file system shows what another machine has written
HELD_TAG = 192  # apart from the links' messages and those of `petra_zoo.petra.gather`


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
    try:
        world = join(device, recipe.data_parallel)
    except PlacementError as error:
        raise SharedError(str(error)) from error
    # Bits do not depend on the threads of a process that computes on a GPU, and machines may differ in their cores.
    threads_here = torch.get_num_threads() if world.device.type == "cpu" else None
    settings = world.gather((threads_here, recipe.model_dump(mode="json")))
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
    told = world.gather((str(found) if found else None, socket.gethostname()))
    mistakes = [(rank, host, mistake) for rank, (mistake, host) in enumerate(told) if mistake]
    if mistakes:
        rank, host, mistake = mistakes[0]
        alike = all(other == mistake for other, _ in told)
        raise SharedError(mistake if alike else f"rank {rank} ({host}): {mistake}") from found
    return result


def require_shared(directory: Path, world: World) -> None:
    """Makes sure that all processes see one directory: each of them writes its part of a checkpoint there.

    Found at the start, and not when the first checkpoint is lost.

    Raises:
        UserError: the directory cannot be written, or a process does not see what has just been written there; every
            process raises it.
    """
    if world.alone:
        return
    host, mark = world.from_reporter((socket.gethostname(), directory / f".seen-{uuid.uuid4().hex}"))

    def leave_mark() -> None:
        try:
            if world.reports:
                mark.touch()
        except OSError as error:
            raise UserError(f"cannot write to {directory}: {error.strerror}; choose another output=DIR") from error

    def look() -> None:
        until = time.monotonic() + SEEN_WITHIN
        while not mark.exists():
            if time.monotonic() > until:
                raise UserError(
                    f"{directory} on {host}, where the run is written, is not what {socket.gethostname()} has under "
                    "that name: choose an output=DIR that all machines share, or checkpoint_every=null"
                )
            time.sleep(0.05)

    together(world, leave_mark)
    try:
        together(world, look)
    finally:
        if world.reports:
            mark.unlink(missing_ok=True)


def average_statistics(model: nn.Module, world: World) -> None:
    """Averages running statistics over the replicas, whose batch norms have seen different images.

    Every process meets the others first: ranks of a pipeline end an epoch one after the other, and one that waited in
    here for its twin would keep its neighbours waiting for messages.
    """
    if world.across is None:
        return
    world.gather(None)
    running = ("running_mean", "running_var")
    statistics = [x for name, x in model.named_buffers() if name.endswith(running) and not x.is_meta]
    if statistics:
        Averaging(statistics, world.across).finish(world.patience, "statistics")


@contextmanager
def held(world: World) -> Iterator[Callable[[], None]]:
    """What the first replica does in here, the others wait for at the end, however long it takes.

    Else they would train on until an update needs the first replica's gradients, and those of their ranks that need
    them later would wait for a message longer than one may take. Where the first replica fails, its connections break
    and the waiting ends; where it freezes, its signs of life stop.

    Yields:
        What the first replica calls now and then: a sign of life.

    Raises:
        LinkError: the first replica's rank has gone, or is silent for too long.
    """
    if world.across is None:
        yield lambda: None
        return
    timeout, reporter = world.patience, world.size - 1  # sees what comes out, and ends last
    if world.replica > 0:
        yield lambda: None
        over = torch.zeros(1)
        while not over:
            what = f"rank {dist.get_rank()} waits for rank {reporter} to validate"
            wait_for(dist.irecv(over, reporter, tag=HELD_TAG), timeout, what)
        return
    others = range(world.size, world.size * world.replicas) if world.last else ()

    def say(over: bool) -> None:
        for other in others:
            work = dist.isend(torch.tensor([float(over)]), other, tag=HELD_TAG)
            wait_for(work, timeout, f"rank {other} has not waited")

    yield lambda: say(False)
    say(True)
