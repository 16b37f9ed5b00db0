"""Channels between neighbouring ranks: one for each direction, with a process group of its own.

NCCL does what one group is asked for in the order of asking. Were all messages up in one group, a rank's send would
queue behind the receive that it has posted ahead, and so on through all ranks: a chain as long as the pipeline.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, Work

LAYOUT, HEADER, BODY = range(3)  # parts of a message; the first comes once


class Channel(Protocol):
    """One direction between this rank and a neighbour; messages come out in the order in which they went in.

    Attributes:
        peer: global rank at the other end.
        timed: whether waiting for a body may have a timeout. NCCL orders the device's work by it, and does not wait:
            with a timeout the host would.
    """

    peer: int
    timed: bool

    def isend(self, x: Tensor, part: int) -> Work | None:
        """Begins to send a part of a message; `x` must stay as it is until that has ended."""

    def irecv(self, x: Tensor, part: int) -> Work | None:
        """Begins to receive a part of a message into `x`."""


class GroupChannel:
    """A channel of torch.distributed.

    Bodies travel by `data`; what tells of them is on the CPU and travels by `control`, so that the host reads it
    without waiting for a device.

    Args:
        peer: global rank at the other end.
        control: gloo's group of the two.
        data: group of the two that takes tensors where they lie; the same one for tensors on the CPU.
    """

    def __init__(self, peer: int, control: ProcessGroup, data: ProcessGroup) -> None:
        self.peer, self.control, self.data = peer, control, data
        self.timed = control is data

    def isend(self, x: Tensor, part: int) -> Work | None:
        return dist.isend(x, self.peer, self.data if part == BODY else self.control, part)

    def irecv(self, x: Tensor, part: int) -> Work | None:
        return dist.irecv(x, self.peer, self.data if part == BODY else self.control, part)


@dataclass(frozen=True)
class Channels:
    """Those of a rank; None where there is no neighbour.

    Attributes:
        from_below, to_above: messages up.
        from_above, to_below: messages down.
    """

    from_below: Channel | None = None
    to_above: Channel | None = None
    from_above: Channel | None = None
    to_below: Channel | None = None


def open_channels(
    pipelines: Sequence[Sequence[int]],
    device: torch.device,
    nccl: bool,
    timeout: timedelta,
    make: Callable[[int, ProcessGroup, ProcessGroup], Channel] = GroupChannel,
) -> Channels:
    """Opens the channels of all pipelines; every process calls it.

    Each is used once: NCCL connects at the first message, and whoever sends it waits until the other end receives.
    Both ends of an edge come to it in the same order, first the edges above even ranks and then those above odd ones:
    no rank waits for a chain of others.

    Args:
        pipelines: global rank of each rank, for each replica.
        device: of this process; with NCCL bodies travel from one device's memory to another's.
        nccl: whether they do.
        timeout: of the groups: what an operation may take that nobody waits for with a timeout of his own.
        make: makes a channel of what `GroupChannel` takes.

    Returns:
        This process's.
    """
    own = dict[tuple[int, str], Channel]()  # by the lower rank's place, and the direction
    here, place = dist.get_rank(), 0
    for pipeline in pipelines:
        for lower, edge in enumerate(pairwise(pipeline)):
            for direction in ("up", "down"):
                control = _group(edge, "gloo", timeout)  # of which every process has to hear, member or not
                data = _group(edge, "nccl", timeout) if nccl else control
                if control and data:
                    peer = edge[0] if here == edge[1] else edge[1]
                    own[lower, direction] = make(peer, control, data)
                    place = pipeline.index(here)
    greeting = torch.zeros(1, device=device if nccl else "cpu")
    for lower, direction in sorted(own, key=lambda key: (key[0] % 2, key)):
        channel, sends = own[lower, direction], (direction == "up") == (lower == place)
        work = (channel.isend if sends else channel.irecv)(greeting, BODY)
        assert work is not None
        work.wait()
    return Channels(
        from_below=own.get((place - 1, "up")),
        to_above=own.get((place, "up")),
        from_above=own.get((place, "down")),
        to_below=own.get((place - 1, "down")),
    )


def _group(ranks: Sequence[int], backend: str, timeout: timedelta) -> ProcessGroup | None:
    """A group, which every process makes; None in those that are no members."""
    made = dist.new_group(list(ranks), timeout, backend)
    return made if isinstance(made, ProcessGroup) else None
