"""PETRA on two processes beside torch's pipelines, DDP and plain training: images per second and peak live bytes.

    OMP_NUM_THREADS=1 python benchmarks/pipeline/run.py
    OMP_NUM_THREADS=1 python benchmarks/pipeline/run.py --validate-plan

All contenders (contenders.py) live side by side in the same two gloo processes, one thread each, and take turns: every
round runs each of them once, in a new order, a block of updates between two barriers, the optimizer's step included.
Each pipeline is split by its own cost, from one profile measured at the start in both processes at once. `capacity` is
what the machine can do: two plain backpropagations at once that do not know each other. A ratio is taken within a
round, and its median over the rounds is reported beside best over best.

Memory is a separate pass, untimed: live bytes (petra_zoo.reversible.LiveBytes) that a contender makes in each process
from its construction on, gradients and optimizer state included, parameters, batch-norm buffers and the images apart.

`--validate-plan` measures the machine's links, predicts PETRA and 1F1B with `petra_zoo.planning.performance`, measures
them, and writes benchmarks/plan/results.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from contenders import Contender, Make, Task, contenders, data
from report import markdown
from torch.multiprocessing.spawn import start_processes

from petra_zoo.petra import Profile, World, measure
from petra_zoo.planning.cluster import Cluster
from petra_zoo.planning.performance import forecast
from petra_zoo.planning.schedules import all_schedules
from petra_zoo.reversible import LiveBytes

HERE = Path(__file__).parent
PLAN = HERE.parent / "plan" / "results.json"
COMMAND = "OMP_NUM_THREADS=1 python benchmarks/pipeline/run.py"
BASELINE, CAPACITY = "backprop, 1 thread", "capacity"


def join(rank: int, processes: int, folder: str) -> World:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes, timeout=timedelta(minutes=10)
    )
    return World(rank=rank, size=processes, peers=tuple(range(processes)))


def shared_profile(task: Task, world: World, repeats: int = 5) -> Profile:
    """The first process's profile, measured while all processes measure: cores share memory and clock."""
    dist.barrier()
    profile = measure(task.model(), task.batch_size, (3, task.size, task.size), repeats=repeats, budget=60.0)
    return Profile.from_json(world.gather(profile.to_json())[0])


def block_seconds(contender: Contender, updates: int) -> float:
    dist.barrier()
    start = time.perf_counter()
    for _ in range(updates):
        contender.update()
    dist.barrier()
    return time.perf_counter() - start


def time_contenders(
    made: dict[str, Contender], world: World, *, rounds: int, updates: int, minutes: float, say: Callable[[str], None]
) -> tuple[dict[str, list[float]], list[float]]:
    """Seconds of every block by contender, and the load average of every round."""
    start = time.monotonic()
    losses: dict[str, float] = {}
    for name, contender in made.items():
        seen = [rows for rows in world.gather(contender.update()) if rows]
        losses |= {name: seen[0][0]} if seen else {}
        contender.update()
    if max(losses.values()) - min(losses.values()) > 1e-5 * max(losses.values()):
        raise RuntimeError(f"contenders do not compute the same loss of the first micro-batch: {losses}")
    say(f"warm after {time.monotonic() - start:.0f} s")
    seconds: dict[str, list[float]] = {name: [] for name in made}
    load: list[float] = []
    for number in range(rounds):
        began = time.monotonic()
        order = list(made)
        random.Random(number).shuffle(order)
        for name in order:
            seconds[name].append(block_seconds(made[name], updates))
        load.append(os.getloadavg()[0])
        now = time.monotonic()
        over = now - start + (now - began) > 60 * minutes
        say(f"round {number + 1} took {now - began:.0f} s, load average {load[-1]:.2f}")
        if world.gather(over)[0]:  # the first process's clock decides
            break
    return seconds, load


def peak_bytes(make: Make, task: Task, world: World) -> int:
    """Peak live bytes that a contender makes in this process, from its construction to its second update's end."""
    model = task.model()
    with LiveBytes([*model.parameters(), *model.buffers()]) as memory:
        contender = make(task, model, world)
        contender.update()
        contender.update()
    dist.barrier()
    return memory.peak


def measure_link(world: World, size: int, repeats: int = 30) -> float:
    """Seconds of an exchange of `size` bytes both ways between the first two processes, receives posted first."""
    mine, theirs = torch.zeros(size, dtype=torch.uint8), torch.empty(size, dtype=torch.uint8)
    seconds = []
    for _ in range(repeats):
        dist.barrier()
        start = time.perf_counter()
        works = [dist.irecv(theirs, 1 - world.rank), dist.isend(mine, 1 - world.rank)]
        for work in works:
            work.wait()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def compare(rank: int, processes: int, folder: str, options: argparse.Namespace) -> None:
    """One process of the comparison."""
    world = join(rank, processes, folder)
    task, say = task_of(options), print if rank == 0 else silent
    profile = shared_profile(task, world)
    result: dict[str, Any] = {"profile": asdict(profile), "load_average": [], "rows": []}
    if options.rounds:
        made = {name: make(task, task.model(), world) for name, make in chosen(profile, options).items()}
        seconds, load = time_contenders(
            made, world, rounds=options.rounds, updates=options.updates, minutes=options.minutes, say=say
        )
        result |= {"load_average": load, "rows": speeds(seconds, made, options.updates)}
    finish(world, folder, "compare", result)


def weigh(rank: int, processes: int, folder: str, options: argparse.Namespace) -> None:
    """One process of the memory pass."""
    world = join(rank, processes, folder)
    task = task_of(options)
    profile = Profile.from_json(json.dumps(json.loads(Path(folder, "compare.json").read_text())["profile"]))
    peaks = {}
    for name, make in chosen(profile, options).items():
        method, m = planned(name)
        if "without" in name or (method is None and processes != 2):
            continue
        for batches in options.m:
            data(task, batches)  # made here, so that they do not count
        peaks[name] = {"measured": world.gather(peak_bytes(make, task, world))}
        if method is not None:
            memory = forecast(profile, method, processes, Cluster(), micro_batches=m).memory
            peaks[name]["predicted"] = [stage.total - stage.parameters for stage in memory]
    finish(world, folder, "weigh", peaks)


def planned(name: str) -> tuple[str | None, int]:
    """What `petra-zoo plan` calls a pipeline, and its m."""
    kind, _, m = name.replace("k=", "m=").partition(", m=")
    method = {"GPipe": "gpipe", "1F1B": "1f1b", "1F1B + checkpointing": "1f1b+checkpoint"}.get(kind, kind)
    return (method, int(m)) if method in all_schedules() else (None, 0)


def finish(world: World, folder: str, name: str, result: Any) -> None:
    """Hands the result to the process that started this one, and ends without waiting for anything."""
    if world.rank == 0:
        Path(folder, f"{name}.json").write_text(json.dumps(result))
    dist.barrier()
    os._exit(0)  # gloo would wait for receives that resting pipelines have posted and nobody answers


def validate(rank: int, processes: int, folder: str, options: argparse.Namespace) -> None:
    """One process of the plan's validation."""
    world = join(rank, processes, folder)
    task = task_of(options)
    sizes = (8, 4 * task.batch_size * task.channels * task.size**2 * 2)
    short, long = (measure_link(world, size) for size in sizes)
    cluster = Cluster(bandwidth=(sizes[1] - sizes[0]) / max(long - short, 1e-9), latency=short)
    profile = shared_profile(task, world)
    m = options.m[-1]
    names = {"petra": f"petra, k={m}", "1f1b": f"1F1B, m={m}"}
    makes = contenders(profile, [m])
    made: dict[str, Any] = {method: makes[name](task, task.model(), world) for method, name in names.items()}
    images = m * task.batch_size * options.updates
    found: dict[str, list[tuple[float, float]]] = {method: [] for method in made}
    load = []
    for contender in made.values():
        block_seconds(contender, 2)
    for _ in range(options.rounds):  # each with a profile of its own: the machine changes
        now = shared_profile(task, world, repeats=3)
        for method, contender in made.items():
            predicted = forecast(now, method, 2, cluster, micro_batches=m, split=contender.split)
            found[method].append((predicted.images_per_second, images / block_seconds(contender, options.updates)))
        load.append(os.getloadavg()[0])
    rows = [
        {
            "method": method,
            "micro_batches": m,
            "split": made[method].split,
            "predicted_images_per_second": statistics.median(predicted for predicted, _ in pairs),
            "measured_images_per_second": statistics.median(measured for _, measured in pairs),
            "predicted_over_measured": statistics.median(predicted / measured for predicted, measured in pairs),
            "rounds": pairs,
        }
        for method, pairs in found.items()
    ]
    result = {
        "link": {"bandwidth": cluster.bandwidth, "latency": cluster.latency, "bytes": sizes[1]},
        "load_average": load,
        "rows": rows,
        "profile": asdict(profile),
    }
    finish(world, folder, "validate", result)


def speeds(seconds: dict[str, list[float]], made: dict[str, Contender], updates: int) -> list[dict[str, Any]]:
    """One row per contender; ratios within a round, median over rounds."""
    rates = {name: [made[name].images * updates / s for s in blocks] for name, blocks in seconds.items()}
    rows = []
    for name, found in rates.items():
        row: dict[str, Any] = {
            "contender": name,
            "images_per_update": made[name].images,
            "split": getattr(made[name], "split", None),
            "images_per_second_best": max(found),
            "images_per_second_median": statistics.median(found),
        }
        for key, reference in (("of_backprop", BASELINE), ("of_capacity", CAPACITY)):
            if reference in rates:
                row[key] = statistics.median(a / b for a, b in zip(found, rates[reference], strict=True))
                row[f"{key}_best"] = max(found) / max(rates[reference])
        rows.append(row)
    return rows


def task_of(options: argparse.Namespace) -> Task:
    return Task(options.blocks, options.channels, options.size, options.batch_size)


def chosen(profile: Profile, options: argparse.Namespace) -> dict[str, Make]:
    words = (*options.only, BASELINE, CAPACITY) if options.only else ("",)
    return {n: make for n, make in contenders(profile, options.m).items() if any(word in n for word in words)}


def silent(text: str) -> None:
    """What the other processes say."""


def header(options: argparse.Namespace) -> dict[str, Any]:
    settings = {k: v for k, v in vars(options).items() if k not in ("output", "validate_plan")}
    return {
        "command": " ".join([COMMAND, *sys.argv[1:]]),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {os.environ['OMP_NUM_THREADS']} thread per process",
        "versions": {name: version(name) for name in ("torch", "timm", "petra-zoo")},
        "settings": settings,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=24, help="reversible blocks; units are two more")
    parser.add_argument("--channels", type=int, default=32)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=8, help="images per micro-batch")
    parser.add_argument("--m", type=int, nargs="+", default=[4, 8], help="micro-batches per update")
    parser.add_argument("--rounds", type=int, default=6, help="0: memory only")
    parser.add_argument("--updates", type=int, default=2, help="updates per block")
    parser.add_argument("--minutes", type=float, default=10.0, help="no round is begun that would end later")
    parser.add_argument("--only", nargs="+", help="contenders whose name has one of these words, and the references")
    parser.add_argument("--memory-processes", type=int, nargs="*", default=[2, 4])
    parser.add_argument("--validate-plan", action="store_true")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if os.environ.get("OMP_NUM_THREADS") != "1":
        parser.error("set OMP_NUM_THREADS=1: threads of two processes would wait for each other")
    output = options.output or (PLAN if options.validate_plan else HERE / "results.json")
    with tempfile.TemporaryDirectory() as folder:

        def run(part: Callable[..., None], processes: int = 2) -> Any:
            start_processes(part, (processes, folder, options), nprocs=processes, start_method="spawn")
            Path(folder, "store").unlink()
            return json.loads(Path(folder, f"{part.__name__}.json").read_text())

        if options.validate_plan:
            result = header(options) | run(validate)
        else:
            result = header(options) | run(compare)
            result["peak_live_bytes"] = {str(n): run(weigh, n) for n in options.memory_processes}
    output.parent.mkdir(exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n")
    output.with_name("README.md").write_text(markdown(result))
    print(markdown(result))


if __name__ == "__main__":
    main()
