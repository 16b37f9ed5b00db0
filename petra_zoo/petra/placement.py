"""Which GPU a process takes, and how messages travel: decided once for all processes, from what each of them sees."""

from __future__ import annotations

import json
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Self

import torch
from torch.distributed import Store

from petra_zoo.errors import UserError
from petra_zoo.wording import counted


class PlacementError(UserError):
    """A mistake that every process finds: one of them saying it is enough."""


@dataclass(frozen=True)
class Surroundings:
    """What a process sees.

    Attributes:
        host: name of its machine.
        kind: of device that it is to compute on: ``cpu`` or ``cuda``.
        index: the GPU that it was told to take; None: any.
        gpus: what tells those that it sees apart from all others, in its own order.
    """

    host: str
    kind: str = "cpu"
    index: int | None = None
    gpus: tuple[str, ...] = ()

    @classmethod
    def here(cls, device: torch.device) -> Self:
        """This process."""
        gpus = []
        if device.type == "cuda":
            gpus = [str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())]
        return cls(socket.gethostname(), device.type, device.index, tuple(gpus))


@dataclass(frozen=True)
class Placement:
    """What is decided.

    Attributes:
        indices: the GPU of each process in its own order; None: the CPU.
        nccl: whether tensors on GPUs travel by NCCL.
        transport: how messages travel and why, in words.
    """

    indices: tuple[int | None, ...]
    nccl: bool
    transport: str

    @classmethod
    def of(cls, places: Sequence[Surroundings]) -> Self:
        """Of processes in the order of their global ranks.

        Raises:
            PlacementError: they do not compute alike, or some were told to share a GPU though there are others.
        """
        where = f"{len(places)} processes on {counted(len({place.host for place in places}), 'machine')}"
        kinds = {place.kind for place in places}
        if len(kinds) > 1:
            one, other = (next(r for r, p in enumerate(places) if p.kind == kind) for kind in sorted(kinds)[:2])
            raise PlacementError(
                f"rank {one} ({places[one].host}) computes on {places[one].kind}, rank {other} "
                f"({places[other].host}) on {places[other].kind}: set device=cpu, or make a GPU visible to each process"
            )
        if kinds != {"cuda"}:
            return cls((None,) * len(places), False, f"{where}, messages by gloo")
        indices = [_index(rank, places) for rank in range(len(places))]
        taken = [(place.host, place.gpus[i]) for place, i in zip(places, indices, strict=True)]
        shared = [rank for rank, gpu in enumerate(taken) if taken.count(gpu) > 1]
        if not shared:
            return cls(tuple(indices), True, f"{where}, a GPU each, messages by NCCL")
        others = [rank for rank in shared if taken[rank] == taken[shared[0]]]
        why = f"ranks {', '.join(map(str, others))} share a GPU of {places[shared[0]].host}, which NCCL refuses"
        return cls(tuple(indices), False, f"{where}, messages by gloo through the host's memory: {why}")


def _index(rank: int, places: Sequence[Surroundings]) -> int:
    """The GPU of a process: what it was told, else one after the other on each machine.

    A launcher may show all GPUs of a machine to each process, or only its own: which then is number 0 for all of them.
    """
    place = places[rank]
    if not place.gpus:
        raise PlacementError(f"rank {rank} ({place.host}) sees no GPU: set device=cpu, or make one visible to it")
    if place.index is None:
        local = sum(other.host == place.host for other in places[:rank])
        return local % len(place.gpus)
    if place.index >= len(place.gpus):
        raise PlacementError(
            f"device=cuda:{place.index}: rank {rank} ({place.host}) sees {len(place.gpus)}, from cuda:0 on"
        )
    alike = [other for other in places if other.host == place.host and other.gpus == place.gpus]
    if len(alike) > 1 and len(place.gpus) > 1 and all(other.index == place.index for other in alike):
        raise PlacementError(
            f"device=cuda:{place.index} would put {len(alike)} processes of {place.host} on one of its "
            f"{len(place.gpus)} GPUs: set device=cuda, and each takes its own"
        )
    return place.index


def exchange_places(store: Store, rank: int, size: int, place: Surroundings, timeout: timedelta) -> list[Surroundings]:
    """What every process sees, in every process, in the order of their ranks; before there are process groups."""
    store.set(f"place {rank}", json.dumps(asdict(place)))
    keys = [f"place {other}" for other in range(size)]
    store.wait(keys, timeout)
    found = [json.loads(store.get(key)) for key in keys]
    return [Surroundings(**{**row, "gpus": tuple(row["gpus"])}) for row in found]
