"""Several processes with GPUs: the same losses as in one, and what a tick costs beside torch's pipelines and DDP.

    python benchmarks/gpus.py --json benchmarks/gpu/gpus.json       # as many processes as GPUs; under 9 minutes
    python benchmarks/gpus.py --processes 2 --json /tmp/two.json    # two on one GPU: through the host's memory
    python benchmarks/gpus.py --quick --json /tmp/quick.json        # tiny, on the CPU; the numbers say nothing

Sections: `equal`, losses of a pipeline against one process's; `speed`, images per second, the time of a tick, what of
it are its stages (`busy`) and memory of each process; `frozen`, seconds until all others have ended once a process is
stopped. With NCCL 2.30 and NCCL_MULTI_RANK_GPU_ENABLE=1 several processes on one GPU could use NCCL; petra-zoo lets
them go through the host's memory. The file is complete after each case, and what it has is not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import start_processes

from petra_zoo.bench.pipeline_contenders import build_network, make_contender, task_data
from petra_zoo.bench.pipeline_jobs import PipelineTask
from petra_zoo.errors import Failure
from petra_zoo.machine import describe_machine, describe_versions
from petra_zoo.petra import Layout, Optimization, Pipeline, World, join
from petra_zoo.strict_json import JsonObject

TASK, QUICK = PipelineTask(channels=128, batch_size=64), PipelineTask(blocks=4, channels=4, img_size=8, batch_size=2)
M = 8  # micro-batches of an update
CONTENDERS = ("petra", "petra without links", "1F1B", "GPipe", "DDP")
TICKS, UPDATES = 24, 6
LINK_TIMEOUT = 5  # seconds, of the run in which a process is stopped


def sgd(named: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for _, p in named], 0.01, momentum=0.9)


def losses(world: World, task: PipelineTask, stages: int) -> list[float]:
    """Of a pipeline, where its head is."""
    model = build_network(task).train()
    layout = Layout.of(model, stages, method="petra", ranks=world.size, input_size=task.input_size)
    pipeline = Pipeline(model.to(world.device), layout, optimization=Optimization(sgd), world=world)
    images, labels = (x.to(world.device).split(task.batch_size) for x in task_data(task, TICKS))
    found: list[Tensor | None] = []
    for batch in zip(images, labels, strict=True):
        found.append((pipeline.step(*batch) if world.first else pipeline.step()).loss)
    found += [output.loss for output in pipeline.drain()]
    pipeline.links.finish()
    return [float(loss) for loss in found if loss is not None]


def equal(world: World, task: PipelineTask, _: str) -> JsonObject:
    """A pipeline over all processes beside one in the last of them alone, with the same stages."""
    torch.backends.cudnn.deterministic = True
    together = losses(world, task, world.size)
    if not world.last:
        return {}
    alone = losses(World(device=world.device), task, world.size)
    apart = max(abs(a - b) / abs(b) for a, b in zip(together, alone, strict=True))
    return {"losses": len(alone), "largest_relative_difference": apart}


def speed(world: World, task: PipelineTask, contender: str) -> JsonObject:
    """An update of a contender."""
    made = make_contender(contender, task, build_network(task), world, M)
    for _ in range(2):
        made.update()
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    wait(world)
    start = time.perf_counter()
    for _ in range(UPDATES):
        made.update()
    wait(world)
    seconds = time.perf_counter() - start
    memory = torch.cuda.max_memory_allocated() if world.device.type == "cuda" else 0
    memories = world.gather(memory)
    return {
        "images_per_second": made.images * UPDATES / seconds,
        "ms_per_micro_batch": 1e3 * seconds / (UPDATES * M),
        "peak_mib": [round(m / 2**20, 1) for m in memories],
    }


def wait(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize()
    world.gather(None)


SECTIONS: dict[str, Callable[[World, PipelineTask, str], JsonObject]] = {"equal": equal, "speed": speed}


def enter(rank: int, size: int, port: int, device: str, quick: bool, section: str, contender: str, out: str) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    world = join(torch.device(device))
    found = SECTIONS[section](world, QUICK if quick else TASK, contender)
    said = next(x for x in reversed(world.gather(found)) if x)
    if world.last:
        Path(out).write_text(json.dumps({**said, "transport": world.transport}))
    world.gather(None)
    os._exit(0)  # receives that resting pipelines have posted are never answered


def in_processes(size: int, device: str, quick: bool, section: str, contender: str) -> JsonObject:
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        arguments = (size, port, device, quick, section, contender, f"{folder}/found")
        start_processes(enter, arguments, nprocs=size, start_method="spawn")
        found: JsonObject = json.loads(Path(folder, "found").read_text())
        return found


def frozen(size: int, device: str) -> JsonObject:
    """A run of the command line of which one process is stopped in mid-training."""
    with tempfile.TemporaryDirectory() as folder:
        settings = [
            "digits/petra_revnet_tiny",
            f"stages={size}",
            "epochs=400",
            f"device={device}",
            f"output={folder}/run",
        ]
        settings += [f"link_timeout={LINK_TIMEOUT}", "log_interval=5", "--nproc", str(size)]
        command = [sys.executable, "-m", "petra_zoo", "train", *settings]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
            assert run.stdout is not None
            for line in run.stdout:
                if line.startswith("epoch"):
                    break
            workers = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, text=True, check=True)
            os.kill(int(workers.stdout.split()[0]), signal.SIGSTOP)
            start = time.monotonic()
            code = run.wait(timeout=180)
            assert run.stderr is not None
            said = [line for line in run.stderr.read().splitlines() if "rank" in line]
        return {"link_timeout": LINK_TIMEOUT, "seconds": time.monotonic() - start, "exit_code": code, "said": said[:1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="the results; what they have is not repeated")
    parser.add_argument("--processes", type=int, help="default: as many as GPUs, and two at least")
    parser.add_argument("--only", metavar="TEXT", default="", help="cases whose name has this text")
    parser.add_argument("--quick", action="store_true", help="a tiny network on the CPU")
    options = parser.parse_args()
    device = "cpu" if options.quick or not torch.cuda.is_available() else "cuda"
    size = options.processes or max(2, torch.cuda.device_count())
    results: JsonObject = json.loads(options.json.read_text()) if options.json.exists() else {}
    facts: JsonObject = {"processes": size, "device": device, **describe_versions(), "machine": describe_machine()}
    if device == "cuda":
        facts["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        facts["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    results["facts"] = facts
    cases = [("equal", "petra"), *(("speed", name) for name in CONTENDERS), ("frozen", "petra")]
    for section, contender in cases:
        name = f"{section}: {contender}"
        if name in results or options.only not in name:
            continue
        try:
            one = frozen(size, device) if section == "frozen" else None
            results[name] = one or in_processes(size, device, options.quick, section, contender)
        except (RuntimeError, Failure, OSError, subprocess.SubprocessError, dist.DistError) as error:
            results[name] = {"failed": str(error).strip().splitlines()[-1]}
        options.json.write_text(json.dumps(results, indent=1))
        print(f"{name}: {json.dumps(results[name])}", flush=True)
    with_links, without = results.get("speed: petra"), results.get("speed: petra without links")
    if isinstance(with_links, dict) and isinstance(without, dict) and "failed" not in with_links | without:
        busy = float(str(without["ms_per_micro_batch"])) / float(str(with_links["ms_per_micro_batch"]))
        results["busy"] = busy
        options.json.write_text(json.dumps(results, indent=1))
        print(f"of a tick, the stages' own work: {busy:.0%}")


if __name__ == "__main__":
    main()
