"""Each rank keeps its own stages; the whole model is put together where somebody wants to save it."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from petra_zoo.petra.layout import Layout
from petra_zoo.petra.waiting import wait_for
from petra_zoo.petra.world import World
from petra_zoo.reversible import Unit, UnitModel, units_of

LARGE = 2**28  # bytes: smaller models are put together in memory
TAG = 128  # apart from the links' messages, which may be on their way
Model = TypeVar("Model", bound=UnitModel)


def keep_only(units: Sequence[Unit], own: Collection[int], device: torch.device) -> None:
    """Moves a rank's own units to its device and all others to the meta device, in place.

    What belongs to no unit (couplings) stays on every rank, and so does what own units share with others.
    """
    needed = {m for i in own for m in units[i].modules()}
    for i, unit in enumerate(units):
        if i in own:
            unit.to(device)
        else:
            _drop(unit, needed)


def _drop(module: nn.Module, needed: Collection[nn.Module]) -> None:
    if not any(m in needed for m in module.modules()):
        module.to("meta")
    elif module not in needed:
        for child in module.children():
            _drop(child, needed)


def whole_model(model: Model, layout: Layout, world: World, scratch: Path | None = None) -> Model | None:
    """A complete copy of a model whose stages are spread over ranks, on the CPU.

    Args:
        model: this rank's, with the other ranks' units on the meta device.
        layout: whose units are where.
        world: this rank's place.
        scratch: a folder with room for a large model, which need not fit into this process's memory: it lies in files
            there, without names, for as long as it is used.

    Raises:
        LinkError: a tensor did not arrive in `World.patience`.
        OSError: there is no room in `scratch`.

    Returns:
        The copy on the last rank, None on the others. Its modes are the model's.
    """
    if world.size == 1:
        whole = copy.deepcopy(model)
        _module(whole).to("cpu").to(memory_format=torch.contiguous_format)
        return whole
    units = units_of(model)
    rank_of: dict[int, int] = {}
    for rank in range(world.size):
        rank_of |= {id(x): rank for i in layout.units_of_rank(rank) for x in _tensors(units[i])}
    limit = world.patience
    named = _module(model).state_dict(keep_vars=True)  # every rank has the same names in the same order
    found: dict[str, Tensor] = {}
    make = partial(_in_file, scratch) if scratch and sum(x.nbytes for x in named.values()) >= LARGE else _in_memory
    for name, x in named.items():
        rank = rank_of.get(id(x), world.size - 1)
        if world.last:
            found[name] = make(x)
        if rank == world.rank == world.size - 1:
            found[name].copy_(x.detach())
        elif rank == world.rank:
            sent = x.detach().to("cpu", memory_format=torch.contiguous_format)
            work = dist.isend(sent, world.peers[-1], world.pipe, TAG)
            wait_for(work, limit, f"rank {world.peers[-1]} did not take {name} from rank {world.peers[rank]}")
        elif world.last:
            work = dist.irecv(found[name], world.peers[rank], world.pipe, TAG)
            wait_for(work, limit, f"rank {world.peers[-1]} waits for {name} from rank {world.peers[rank]}")
    if not world.last:
        return None
    whole = copy.deepcopy(model)
    _module(whole).load_state_dict(found, assign=True)  # the tensors themselves: there is no room for others
    return whole


def _in_memory(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype)


def _in_file(folder: Path, x: Tensor) -> Tensor:
    """A tensor of that shape and type in a file that is gone when the tensor is."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".gathering-") as file:
        if x.numel() == 0:
            return _in_memory(x)
        if hasattr(os, "posix_fallocate"):  # else a full disk would be found where it is written to
            os.posix_fallocate(file.fileno(), 0, x.nbytes)
        return torch.from_file(file.name, shared=True, size=x.numel(), dtype=x.dtype).view(x.shape)


def _tensors(unit: Unit) -> list[Tensor]:
    return [*unit.parameters(), *unit.buffers()]


def _module(model: UnitModel) -> nn.Module:
    assert isinstance(model, nn.Module)
    return model
