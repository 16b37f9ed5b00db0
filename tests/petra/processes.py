"""Runs a function in several gloo processes, for the tests of the engine."""

import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from petra_zoo.petra import World, join, leave

Work = Callable[..., Any]


def _enter(rank: int, size: int, port: int, folder: str, work: Work, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        found = work(*arguments)
    except BaseException:
        Path(folder, f"error{rank}").write_text(traceback.format_exc())
        raise
    torch.save(found, f"{folder}/result{rank}")
    leave()


def run_processes(size: int, folder: Path, work: Work, *arguments: Any) -> list[Any]:
    """Calls `work(*arguments)` in `size` processes that find each other through the environment.

    Returns:
        What each of them gave, by rank.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port = store.port
    del store  # the port is free again
    mp.spawn(_enter, (size, port, str(folder), work, arguments), nprocs=size)
    return [torch.load(folder / f"result{rank}", weights_only=False) for rank in range(size)]


def own_world(replicas: int = 1) -> World:
    """This process's place, on the CPU."""
    return join(torch.device("cpu"), replicas)
