"""The processes that train together: D replicas of a pipeline of R ranks.

Launched by torch.distributed.run (`petra-zoo train --nproc N`, torchrun) or by SLURM; alone where nothing launched.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import init_device_mesh

from petra_zoo.errors import UserError
from petra_zoo.petra.channels import Channels, open_channels
from petra_zoo.petra.links import LinkError, Wire
from petra_zoo.petra.meeting import fresh_store
from petra_zoo.petra.placement import Placement, Surroundings, exchange_places

T = TypeVar("T")
START_TIMEOUT = timedelta(minutes=10)  # until every rank has built its model and made its first updates


@dataclass(frozen=True)
class World:
    """This process's place.

    Attributes:
        rank: place in the pipeline, 0 (owns the stem) to size - 1 (owns the head).
        size: ranks of a pipeline.
        replica: which replica of the pipeline, 0 to replicas - 1.
        replicas: D; replicas see different micro-batches and average their gradients.
        device: where this rank computes.
        peers: global rank of each rank of this pipeline.
        channels: to the ranks beside it, of the training.
        evaluation_channels: likewise, of an evaluation, beside which messages of the training are under way.
        pipe: process group of this pipeline's ranks.
        across: process group of the same rank in every replica; None where there is one replica.
        meeting: process group of all processes; None: torch's, whose timeout is `START_TIMEOUT`.
        nccl: whether CUDA tensors travel by NCCL.
        transport: how messages travel and why, in words.
        wire: the types in which messages travel, and how long one may take.
    """

    rank: int = 0
    size: int = 1
    replica: int = 0
    replicas: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    peers: tuple[int, ...] = (0,)
    channels: Channels = field(default_factory=Channels)
    evaluation_channels: Channels = field(default_factory=Channels)
    pipe: ProcessGroup | None = None
    across: ProcessGroup | None = None
    meeting: ProcessGroup | None = None
    nccl: bool = False
    transport: str = ""
    wire: Wire = field(default_factory=Wire)

    @property
    def first(self) -> bool:
        """Whether this rank owns the stem, and feeds the images."""
        return self.rank == 0

    @property
    def last(self) -> bool:
        """Whether this rank owns the head, and sees the losses."""
        return self.rank == self.size - 1

    @property
    def alone(self) -> bool:
        """Whether there is no other process."""
        return self.size * self.replicas == 1

    @property
    def patience(self) -> timedelta:
        """How long another process may be about something else than a tick: data, a disk, somebody's callback.

        Who owes a message of a tick says so when it waits for data; of everything else nobody hears.
        """
        return max(START_TIMEOUT, timedelta(seconds=self.wire.timeout))

    @property
    def reports(self) -> bool:
        """Whether this process speaks for all: the last rank of the first replica, where the losses are."""
        return self.last and self.replica == 0

    def gather(self, value: T) -> list[T]:
        """`value` of every process, in the order of their global ranks, in every process. Small things only.

        Raises:
            LinkError: a process has gone, or is silent for too long.
        """
        if self.alone:
            return [value]
        values = [value] * dist.get_world_size()  # all of them are overwritten
        try:
            dist.all_gather_object(values, value, group=self.meeting)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0][:160]
            raise LinkError(f"rank {dist.get_rank()} does not hear of all others: {reason}") from error
        return values

    def from_reporter(self, value: T) -> T:
        """The reporting process's `value`, in every process."""
        return next(x for speaks, x in self.gather((self.reports, value)) if speaks)


def world_size() -> int:
    """Number of processes that were launched together, from the environment."""
    return _from_env()[2]


def global_rank() -> int:
    """This process among them, from the environment."""
    return _from_env()[1]


def _from_env() -> tuple[int, int, int]:
    """This process on its machine, among all, and their number."""
    from timm.utils.distributed import world_info_from_env  # here, so that the engine is imported without timm

    local_rank, rank, size = world_info_from_env()
    return int(local_rank), int(rank), int(size)


def join(device: torch.device, replicas: int = 1) -> World:
    """Joins the processes that were launched with this one.

    CPU tensors travel by gloo. CUDA tensors travel by NCCL where every process has a GPU of its own, else through
    pinned memory by gloo.

    Args:
        device: of this process; ``cuda`` without an index becomes one after the other on each machine.
        replicas: D.

    Raises:
        UserError: the processes do not divide into D replicas, do not compute alike, or the port is taken; says what
            would do.
    """
    _, rank, size = _from_env()
    if size % replicas:
        raise UserError(
            f"data_parallel={replicas} does not divide {size} processes: launch a multiple of {replicas}, or set "
            f"data_parallel to a divisor of {size}"
        )
    if size == 1:
        return World(device=_take(device, device.index or 0) if device.type == "cuda" else device)
    placement = _meet(device, rank, size)
    index = placement.indices[rank]
    device = device if index is None else _take(device, index)
    shape = (replicas, size // replicas)
    mesh = init_device_mesh("cuda" if placement.nccl else "cpu", shape, mesh_dim_names=("data", "pipe"))
    place = mesh.get_coordinate()
    assert place is not None
    pipelines = mesh.mesh.tolist()

    def channels() -> Channels:
        return open_channels(pipelines, device, placement.nccl, START_TIMEOUT)

    return World(
        rank=place[1],
        size=size // replicas,
        replica=place[0],
        replicas=replicas,
        device=device,
        peers=tuple(pipelines[place[0]]),
        channels=channels(),
        evaluation_channels=channels(),
        pipe=mesh.get_group("pipe"),
        across=mesh.get_group("data") if replicas > 1 else None,
        nccl=placement.nccl,
        transport=placement.transport,
    )


def _meet(device: torch.device, rank: int, size: int) -> Placement:
    """Finds the other processes and decides with them; then there is torch's process group of all."""
    local, *_ = _from_env()
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(local))  # SLURM and MPI say it otherwise
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=START_TIMEOUT))
        store = fresh_store(store, rank, size, START_TIMEOUT)
        placement = Placement.of(exchange_places(store, rank, size, Surroundings.here(device), START_TIMEOUT))
        backend = "cpu:gloo,cuda:nccl" if placement.nccl else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=START_TIMEOUT)
    except dist.DistNetworkError as error:
        address = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
        taken = "EADDRINUSE" in str(error) or "in use" in str(error)
        what = "is in use: set MASTER_PORT to a free port on every rank" if taken else f"cannot be reached: {error}"
        raise UserError(f"the rendezvous at {address} {what}") from error
    except (dist.DistStoreError, TimeoutError) as error:
        raise UserError(
            f"not all of the {size} processes have come within {START_TIMEOUT}: start as many, with the same "
            "MASTER_ADDR and MASTER_PORT"
        ) from error
    except UserError:
        raise
    except (KeyError, ValueError) as error:
        raise UserError(f"processes cannot find each other: {error} (set MASTER_ADDR and MASTER_PORT)") from error
    return placement


def _take(device: torch.device, index: int) -> torch.device:
    """A GPU, which becomes this process's own."""
    device = torch.device(device.type, index)
    torch.cuda.set_device(device)
    return device


def abort() -> None:
    """Gives up all that is under way: for when another process has gone or is silent.

    Gloo's operations end with the process. NCCL's lie in the device's queue, and whoever leaves would wait for them.
    """
    if dist.is_initialized() and dist.is_nccl_available() and "nccl" in dist.get_backend_config():
        dist.distributed_c10d._abort_process_group()


def leave() -> None:
    """Leaves the others, at the end of a run; without others, does nothing."""
    if dist.is_initialized():
        dist.destroy_process_group()
