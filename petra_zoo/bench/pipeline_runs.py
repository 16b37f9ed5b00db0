"""What a worker measures of a pipeline's contender, in gloo processes of its own."""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

from petra_zoo.bench.pipeline_contenders import PipelineContender, build_network, make_contender, task_data
from petra_zoo.bench.pipeline_jobs import BASELINE, CAPACITY, PLANNED, PipelineJob, PipelineTask
from petra_zoo.bench.turns import median_ratio, take_turns
from petra_zoo.bench.workers import end_with_parent
from petra_zoo.petra import Profile, World, measure
from petra_zoo.planning.cluster import Cluster
from petra_zoo.planning.performance import Forecast, forecast
from petra_zoo.reversible import LiveBytes
from petra_zoo.strict_json import JsonObject, to_json

_WARM_UP = 2  # updates of a contender before it is timed


Measure = Callable[[PipelineJob, World], JsonObject]


def in_processes(job: PipelineJob) -> JsonObject:
    """Does a job in processes of its own; gives what the first of them measured."""
    measures: dict[str, Measure] = {"speed": measure_speed, "memory": measure_memory, "plan": measure_plan}
    with tempfile.TemporaryDirectory() as folder:
        arguments = (measures[job.part], job, folder)
        # Daemons end with this worker, in whatever way it ends.
        start_processes(_process, arguments, nprocs=job.processes, daemon=True, start_method=_start_method())
        found: JsonObject = json.loads(Path(folder, "result.json").read_text())
        return found


def _start_method() -> str:
    """Processes of a server that has imported torch once: no seconds of every run go into imports."""
    if "forkserver" not in multiprocessing.get_all_start_methods():  # Windows
        return "spawn"
    multiprocessing.set_forkserver_preload([__name__])
    return "forkserver"


def _process(rank: int, measure_part: Measure, job: PipelineJob, folder: str) -> None:
    end_with_parent()  # where the worker is killed, nobody else would
    torch.set_num_threads(1)
    store, size = f"file://{folder}/store", job.processes
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=timedelta(minutes=10))
    result = measure_part(job, World(rank=rank, size=size, peers=tuple(range(size))))
    if rank == 0:
        Path(folder, "result.json").write_text(to_json(result))
    dist.barrier()
    os._exit(0)  # gloo would wait for receives that resting pipelines have posted and nobody answers


def measure_speed(job: PipelineJob, world: World) -> JsonObject:
    """Images per second of a contender, and over those of its references."""
    ms = {BASELINE: job.reference_m, CAPACITY: job.reference_m, job.contender: job.m}
    made = {name: make_contender(name, job.task, build_network(job.task), world, m) for name, m in ms.items()}
    _check_same_loss(made, world)
    blocks = {name: _timed(contender, job.updates) for name, contender in made.items()}
    seconds = take_turns(blocks, job.rounds, warm_up=1)
    rates = {name: [made[name].images * job.updates / s for s in found] for name, found in seconds.items()}
    own = rates[job.contender]
    return {
        "images_per_second": statistics.median(own),
        "images_per_second_best": max(own),
        "over_backprop": median_ratio(own, rates[BASELINE]),
        "of_capacity": median_ratio(own, rates[CAPACITY]),
        "of_capacity_rounds": [mine / whole for mine, whole in zip(own, rates[CAPACITY], strict=True)],
        "images_per_update": made[job.contender].images,
        "split": _split(made[job.contender]),
    }


def _check_same_loss(made: dict[str, PipelineContender], world: World) -> None:
    """A first update of each: what does not train the same network is not compared."""
    first = {name: [losses[0] for losses in world.gather(made[name].update()) if losses] for name in made}
    expected = first[BASELINE][0]
    for name, losses in first.items():
        if any(abs(loss - expected) > 1e-5 * expected for loss in losses[:1]):
            raise RuntimeError(f"{name}: loss {losses[0]} of the first micro-batch, but {expected} of {BASELINE}")


def _timed(contender: PipelineContender, updates: int) -> Callable[[], float]:
    def block() -> float:
        dist.barrier()
        start = time.perf_counter()
        for _ in range(updates):
            contender.update()
        dist.barrier()
        return time.perf_counter() - start

    return block


def measure_memory(job: PipelineJob, world: World) -> JsonObject:
    """Peak live bytes that a contender makes in each process, from its construction to its second update's end."""
    task_data(job.task, job.m)  # made here, so that it does not count
    model = build_network(job.task)
    with LiveBytes([*model.parameters(), *model.buffers()]) as memory:
        contender = make_contender(job.contender, job.task, model, world, job.m)
        contender.update()
        contender.update()
    result: JsonObject = {"peak_bytes": world.gather(memory.peak)}
    if world.first and job.contender in PLANNED:
        profile = _profile(job.task, repeats=1)  # bytes do not depend on times
        planned = _forecast(profile, job, contender, Cluster())
        result["predicted_bytes"] = [stage.total - stage.parameters for stage in planned.memory]
    return result


def measure_plan(job: PipelineJob, world: World) -> JsonObject:
    """Predicts a contender's images per second, and measures them: in every round with a profile of its own."""
    task = job.task
    message = 4 * task.batch_size * task.channels * task.img_size**2 * 2
    short, long = (_exchange_seconds(world, size) for size in (8, message))
    cluster = Cluster(bandwidth=(message - 8) / max(long - short, 1e-9), latency=short)
    contender = make_contender(job.contender, task, build_network(task), world, job.m)
    block = _timed(contender, job.updates)
    for _ in range(_WARM_UP):
        contender.update()
    predicted, measured = [], []
    for _ in range(job.rounds):  # the machine changes
        dist.barrier()
        profile = Profile.from_json(world.gather(_profile(task, repeats=3).to_json())[0])  # all measure at once
        predicted.append(_forecast(profile, job, contender, cluster).images_per_second)
        measured.append(contender.images * job.updates / block())
    return {
        "predicted_images_per_second": statistics.median(predicted),
        "images_per_second": statistics.median(measured),
        "predicted_over_measured": median_ratio(predicted, measured),
        "split": _split(contender),
        "bandwidth": cluster.bandwidth,
        "latency": cluster.latency,
    }


def _profile(task: PipelineTask, repeats: int) -> Profile:
    return measure(build_network(task), task.batch_size, task.input_size, repeats=repeats, budget=60.0)


def _forecast(profile: Profile, job: PipelineJob, contender: PipelineContender, cluster: Cluster) -> Forecast:
    split = contender.split
    assert split is not None
    return forecast(profile, PLANNED[job.contender], len(split), cluster, micro_batches=job.m, split=split)


def _split(contender: PipelineContender) -> list[int] | None:
    return None if contender.split is None else list(contender.split)


def _exchange_seconds(world: World, size: int, repeats: int = 30) -> float:
    """Seconds of an exchange of so many bytes both ways between two processes, receives posted first."""
    mine, theirs = torch.zeros(size, dtype=torch.uint8), torch.empty(size, dtype=torch.uint8)
    seconds = []
    for _ in range(repeats):
        dist.barrier()
        start = time.perf_counter()
        works = [dist.irecv(theirs, 1 - world.rank), dist.isend(mine, 1 - world.rank)]
        for work in works:
            if work is not None:
                work.wait()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
