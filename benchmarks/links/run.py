"""PETRA's tick over a link that is slow: two machines, as far as one machine can be two, beside what `plan` predicts.

    sudo python benchmarks/links/run.py             # needs root, iproute2 and two idle cores; about five minutes
    python benchmarks/links/run.py --table          # README.md from results.json

Two network namespaces, each with a process of one stage, joined by a link that hands every packet on when its time has
come: so many milliseconds after it was sent, and behind those before it at so many bytes per second. (netem does the
same in the kernel; not every kernel has it.)
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import select
import statistics
import struct
import subprocess
import sys
import time
from collections import deque
from multiprocessing import Process
from pathlib import Path
from typing import Any

import timm
import torch

from petra_zoo.machine import describe_machine
from petra_zoo.petra import Layout, Optimization, Pipeline, World, join, leave
from petra_zoo.petra.measuring import measure
from petra_zoo.petra.profile import Profile
from petra_zoo.planning.cluster import Cluster
from petra_zoo.planning.performance import forecast
from petra_zoo.reversible import UnitModel

RESULTS, README = (Path(__file__).with_name(name) for name in ("results.json", "README.md"))
NAME, BATCH, SIZE = "petra_revnet18_cifar", 4, 32
LATENCIES = (0.0, 0.001, 0.01, 0.1, 0.4)  # seconds, one way
ROUNDS = 2  # of all latencies in turn: the machine changes
BANDWIDTH = 100e6  # bytes per second, each way
WARM_UP, TICKS = 6, 14
ENDS = ("petra-a", "petra-b")
PACKET = 60_000  # bytes


def build() -> tuple[UnitModel, list[int]]:
    """The network, and its partition into two stages."""
    torch.manual_seed(0)
    model = timm.create_model(NAME, num_classes=10).train()
    return model, list(Layout.of(model, 2, method="petra", ranks=2, input_size=(3, SIZE, SIZE)).sizes)


def train(world: World) -> list[float]:
    """Seconds of each tick, in every process."""
    torch.set_num_threads(1)
    model, split = build()
    sgd = Optimization(lambda named: torch.optim.SGD([p for _, p in named], 0.01, momentum=0.9))
    pipeline = Pipeline(model, split, optimization=sgd, world=world)
    images, labels = torch.randn(BATCH, 3, SIZE, SIZE), torch.arange(BATCH)
    ends = []
    for _ in range(WARM_UP + TICKS):
        pipeline.step(images, labels) if world.first else pipeline.step()
        ends.append(time.perf_counter())
    pipeline.drain()
    pipeline.links.finish()
    return [after - before for before, after in zip(ends[WARM_UP - 1 :], ends[WARM_UP:], strict=False)]


def one_end() -> None:
    """A process in a namespace."""
    world = join(torch.device("cpu"))
    seconds = train(world)
    if world.last:
        print(json.dumps(seconds))
    leave()


class Way:
    """One direction of the link: packets that are under way."""

    def __init__(self, into: int, latency: float) -> None:
        self.into, self.latency = into, latency
        self.free = 0.0  # when what was sent so far has left
        self.packets = deque[tuple[float, bytes]]()  # and when each is due

    def take(self, packet: bytes) -> None:
        self.free = max(self.free, time.perf_counter()) + len(packet) / BANDWIDTH
        self.packets.append((self.free + self.latency, packet))

    def deliver(self) -> float:
        """Hands on what is due; seconds until the next is."""
        while self.packets and self.packets[0][0] <= time.perf_counter():
            os.write(self.into, self.packets.popleft()[1])
        return max(0.0, self.packets[0][0] - time.perf_counter()) if self.packets else 1.0


def carry(fds: tuple[int, int], latency: float) -> None:
    """The link: takes packets at both ends until it is stopped."""
    ways = {fds[0]: Way(fds[1], latency), fds[1]: Way(fds[0], latency)}
    while True:
        wait = min(way.deliver() for way in ways.values())
        for fd in select.select(list(fds), [], [], wait)[0]:
            ways[fd].take(os.read(fd, 65536))


def sh(*command: str) -> None:
    subprocess.run(command, check=True)


def open_link() -> tuple[int, int]:
    """Two namespaces, and the two ends of what will join them."""
    fds = []
    for i, end in enumerate(ENDS):
        sh("ip", "netns", "add", end)
        fd = os.open("/dev/net/tun", os.O_RDWR)
        fcntl.ioctl(fd, 0x400454CA, struct.pack("16sH", b"petra%d" % i, 0x0001 | 0x1000))  # TUNSETIFF: a tun, bare
        sh("ip", "link", "set", f"petra{i}", "netns", end)
        sh("ip", "-n", end, "link", "set", "lo", "up")
        sh("ip", "-n", end, "addr", "add", f"10.77.0.{i + 1}/24", "dev", f"petra{i}")
        sh("ip", "-n", end, "link", "set", f"petra{i}", "mtu", str(PACKET), "up")
        fds.append(fd)
    return fds[0], fds[1]


def close_link(fds: tuple[int, int]) -> None:
    for fd in fds:
        os.close(fd)
    for end in ENDS:
        subprocess.run(["ip", "netns", "del", end], check=False)


def over_link(latency: float) -> list[float]:
    """Ticks of two processes with the link between them."""
    fds = open_link()
    link = Process(target=carry, args=(fds, latency), daemon=True)
    link.start()
    try:
        ends = []
        for rank, end in enumerate(ENDS):
            env = os.environ | {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "OMP_NUM_THREADS": "1"}
            env |= {"MASTER_ADDR": "10.77.0.1", "MASTER_PORT": "29511", "GLOO_SOCKET_IFNAME": f"petra{rank}"}
            # A name of its own in each: that is how processes know that they are on two machines.
            inside = f"hostname {end}; exec {sys.executable} {__file__} --end"
            command = ["ip", "netns", "exec", end, "unshare", "--uts", "sh", "-c", inside]
            ends.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True))
        said = [end.communicate(timeout=600)[0] for end in ends]
        assert all(end.returncode == 0 for end in ends), said
        found: list[float] = json.loads(said[-1].splitlines()[-1])
        return found
    finally:
        link.terminate()
        close_link(fds)


def predicted(profile: Profile, split: list[int], latency: float, scale: float = 1.0) -> float:
    """Seconds of a tick, by `petra-zoo plan`'s arithmetic; scale: of the times in the profile."""
    cluster = Cluster(BANDWIDTH / scale, latency / scale)
    found = forecast(profile, "petra", 2, cluster, micro_batches=1, split=split)
    return scale * BATCH / found.images_per_second


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true", help="write README.md from the results")
    parser.add_argument("--end", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.end:
        return one_end()
    if not options.table:
        if os.geteuid():
            sys.exit("network namespaces need root")
        ticks: dict[float, list[float]] = {latency: [] for latency in LATENCIES}
        for latency in LATENCIES * ROUNDS:
            ticks[latency] += over_link(latency)
            print(latency, statistics.median(ticks[latency]), flush=True)
        rows = [{"latency": latency, "seconds": statistics.median(found)} for latency, found in ticks.items()]
        # Both stages computed beside each other and the link; the times of one process alone are scaled to that, once.
        torch.set_num_threads(1)
        model, split = build()
        profile = measure(model, BATCH, (3, SIZE, SIZE))
        scale = rows[0]["seconds"] / predicted(profile, split, 0.0)
        for row in rows:
            row["predicted"] = predicted(profile, split, row["latency"], scale)
        settings = {"model": NAME, "batch_size": BATCH, "img_size": SIZE, "bandwidth": BANDWIDTH, "scale": scale}
        RESULTS.write_text(json.dumps({"settings": settings, "rows": rows, "machine": describe_machine()}, indent=1))
    README.write_text(page(json.loads(RESULTS.read_text())))


def page(results: dict[str, Any]) -> str:
    settings, rows = results["settings"], results["rows"]
    lines = [
        "# A tick over a slow link\n",
        f"`sudo python benchmarks/links/run.py`: {settings['model']}, two stages in two network namespaces,",
        f"micro-batches of {settings['batch_size']} images of {settings['img_size']}x{settings['img_size']}, a link of "
        f"{settings['bandwidth'] / 1e6:.0f} MB/s each way. Median of {ROUNDS * TICKS} ticks in",
        f"{ROUNDS} rounds of all latencies; predicted by the arithmetic of `petra-zoo plan`, whose times of one",
        "process alone are scaled once, so that it agrees without latency "
        f"(by {settings['scale']:.2f}: two processes and the link share two cores).\n",
        "| latency, one way | ms of a tick | predicted |",
        "|---|---|---|",
    ]
    lines += [
        f"| {1e3 * row['latency']:g} ms | {1e3 * row['seconds']:.0f} | {1e3 * row['predicted']:.0f} |" for row in rows
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
