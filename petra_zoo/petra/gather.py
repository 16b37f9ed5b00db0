"""Each rank keeps its own stages; the whole model is put together where somebody wants to save it."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from petra_zoo.petra.layout import Layout
from petra_zoo.petra.waiting import wait_for
from petra_zoo.petra.world import World
from petra_zoo.reversible import Unit, UnitModel, units_of

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


def whole_model(model: Model, layout: Layout, world: World) -> Model | None:
    """A complete copy of a model whose stages are spread over ranks, on the CPU.

    Args:
        model: this rank's, with the other ranks' units on the meta device.
        layout: whose units are where.
        world: this rank's place.

    Raises:
        LinkError: a tensor did not arrive within the wire's timeout.

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
    found, limit = {}, timedelta(seconds=world.wire.timeout)
    for name, x in _module(model).state_dict(keep_vars=True).items():  # every rank has the same names in the same order
        rank = rank_of.get(id(x), world.size - 1)
        if rank == world.rank:
            found[name] = x.detach().to("cpu", memory_format=torch.contiguous_format)
        if rank == world.size - 1:
            continue
        if rank == world.rank:
            work = dist.isend(found[name], world.peers[-1], world.pipe, TAG)
            wait_for(work, limit, f"rank {world.peers[-1]} did not take {name} from rank {world.peers[rank]}")
        elif world.last:
            found[name] = torch.empty(x.shape, dtype=x.dtype)
            work = dist.irecv(found[name], world.peers[rank], world.pipe, TAG)
            wait_for(work, limit, f"rank {world.peers[-1]} waits for {name} from rank {world.peers[rank]}")
    if not world.last:
        return None
    whole = copy.deepcopy(model)
    _module(whole).to_empty(device="cpu")
    whole.load_state_dict(found)
    return whole


def _tensors(unit: Unit) -> list[Tensor]:
    return [*unit.parameters(), *unit.buffers()]


def _module(model: UnitModel) -> nn.Module:
    assert isinstance(model, nn.Module)
    return model
