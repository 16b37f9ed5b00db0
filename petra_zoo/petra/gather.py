"""Each rank keeps its own stages; the whole model is put together where somebody wants to save it."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from petra_zoo.petra.process_links import wait_for
from petra_zoo.petra.world import World
from petra_zoo.reversible import Unit

TAG = 128  # apart from the links' messages, which may be on their way


def keep_only(units: Sequence[Unit], own: Collection[int], device: torch.device) -> None:
    """Moves a rank's own units to its device and all others to the meta device, in place.

    What belongs to no unit (couplings) stays on every rank.
    """
    for i, unit in enumerate(units):
        unit.to(device if i in own else "meta")


def whole_model(
    model: Any, partition: Sequence[range], owners: Sequence[range], world: World, timeout: float = 60.0
) -> Any:
    """A complete copy of a model whose stages are spread over ranks, on the CPU.

    Args:
        model: this rank's, with the other ranks' units on the meta device.
        partition: units of each stage.
        owners: stages of each rank.
        world: this rank's place.
        timeout: seconds that one tensor may take.

    Raises:
        LinkError: a tensor did not arrive.

    Returns:
        The copy on the last rank, None on the others. Its modes are the model's.
    """
    if world.size == 1:
        return copy.deepcopy(model).to("cpu", memory_format=torch.contiguous_format)
    state = model.state_dict(keep_vars=True)
    units = model.units()
    rank_of_unit = [rank for rank, stages in enumerate(owners) for j in stages for _ in partition[j]]
    rank_of = {id(x): rank_of_unit[i] for i, unit in enumerate(units) for x in _tensors(unit)}
    found, limit = {}, timedelta(seconds=timeout)
    for name, x in state.items():  # every rank has the same names in the same order
        rank = rank_of.get(id(x), world.size - 1)
        if rank == world.rank:
            found[name] = x.detach().to("cpu", memory_format=torch.contiguous_format)
        if rank == world.size - 1:
            continue
        if rank == world.rank:
            work = dist.isend(found[name], world.peers[-1], world.up, TAG)
            wait_for(work, limit, f"rank {world.peers[-1]} did not take {name} from rank {world.peers[rank]}")
        elif world.last:
            found[name] = torch.empty(x.shape, dtype=x.dtype)
            work = dist.irecv(found[name], world.peers[rank], world.up, TAG)
            wait_for(work, limit, f"rank {world.peers[-1]} waits for {name} from rank {world.peers[rank]}")
    if not world.last:
        return None
    whole = copy.deepcopy(model).to_empty(device="cpu")
    whole.load_state_dict(found)
    return whole


def _tensors(unit: Unit) -> list[Any]:
    return [*unit.parameters(), *unit.buffers()]
