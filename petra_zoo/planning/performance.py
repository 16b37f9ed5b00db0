"""The performance model behind `petra-zoo plan`: what a method would do on devices that are not here.

From a profile of the units and the links' bandwidth and latency it predicts, for one stage per device: images per
second, what crosses every link, what every device holds, and how old gradients are. Not modelled: the optimizer's
step, data loading, and devices that slow each other down (measure the profile under the load it will see).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from petra_zoo.petra.partition import balance
from petra_zoo.petra.profile import WORK, Profile, UnitProfile, Work
from petra_zoo.planning.quantities import format_bytes
from petra_zoo.planning.schedules import gpipe, one_forward_one_backward, tick_seconds, update_seconds
from petra_zoo.planning.stage_memory import Memory, stage_memory

ASYNCHRONOUS = ("petra", "dsp", "delayed")
METHODS = (*ASYNCHRONOUS, "1f1b", "1f1b+checkpoint", "gpipe", "ddp")
_SYNCHRONOUS_WORK: dict[str, Work] = {"1f1b": "graph", "1f1b+checkpoint": "rerun", "gpipe": "graph", "ddp": "graph"}


@dataclass(frozen=True)
class Cluster:
    """Equal devices with equal links between neighbours.

    Attributes:
        bandwidth: of a link, bytes per second in each direction.
        latency: of a message, seconds.
        memory: of a device, bytes; None: no limit.
    """

    bandwidth: float = float("inf")
    latency: float = 0.0
    memory: float | None = None

    def seconds(self, size: float) -> float:
        """Seconds that a message of this many bytes takes."""
        return self.latency + size / self.bandwidth

    def all_reduce_seconds(self, size: float, replicas: int) -> float:
        """Seconds of a ring all-reduce: 2 (D - 1) steps, each with a D-th of the bytes."""
        return 2 * (replicas - 1) * self.seconds(size / replicas)


@dataclass(frozen=True)
class Link:
    """Bytes per micro-batch (PETRA: per tick) between two neighbouring stages."""

    up: int
    down: int


@dataclass(frozen=True)
class Prediction:
    """What a method would do.

    Attributes:
        replicas: D, data parallel.
        stages: p or J, of each replica; D * p devices work, the others are idle.
        split: units per stage.
        micro_batches: per update and replica: m of a synchronous schedule, k of an asynchronous one.
        images_per_second: in the long run, of all replicas.
        efficiency: images per second of a device, over plain backpropagation on one.
        links: between neighbouring stages of a replica.
        all_reduce: bytes that each device of a stage sends per update, for each stage.
        memory: of a device of each stage.
        delay: of each stage, in ticks between the forward and the backward of a micro-batch.
        rejected: why it does not fit the cluster, or None.
    """

    method: str
    devices: int
    replicas: int
    stages: int
    split: tuple[int, ...]
    micro_batches: int
    images_per_second: float
    efficiency: float
    links: tuple[Link, ...]
    all_reduce: tuple[int, ...]
    memory: tuple[Memory, ...]
    delay: tuple[int, ...]
    rejected: str | None

    @property
    def update_delay(self) -> tuple[float, ...]:
        """Delay of each stage in updates."""
        return tuple(ticks / self.micro_batches for ticks in self.delay)


def predict(
    profile: Profile,
    method: str,
    devices: int,
    cluster: Cluster,
    *,
    micro_batches: int = 8,
    optimizer_states: int = 1,
    factorisation: tuple[int, int] | None = None,
    split: Sequence[int] | None = None,
) -> Prediction:
    """Predicts one method on a number of devices.

    Args:
        profile: of the model's units at the micro-batch size.
        method: one of `METHODS`.
        devices: how many there are.
        cluster: their links and memory.
        micro_batches: images of an update over the profile's batch size, of all replicas together.
        optimizer_states: numbers of state per parameter.
        factorisation: (replicas D, stages p). Default: one pipeline over all devices; with more devices than units
            the fastest that fits the memory.
        split: units per stage of one pipeline over all devices; default: balanced by the method's own cost.

    Raises:
        ValueError: an unknown method, or numbers that do not fit.
    """
    if method not in METHODS:
        raise ValueError(f"method is one of {', '.join(METHODS)}, not {method!r}")
    if devices < 1 or micro_batches < 1:
        raise ValueError(f"devices={devices} and micro_batches={micro_batches} must be at least 1")
    units = len(profile.units)
    if split is not None and (len(split) != devices or sum(split) != units or min(split) < 1):
        raise ValueError(f"split={list(split)} must be {devices} positive numbers that add up to {units} units")
    if factorisation is not None:
        choices = [factorisation]
    elif method == "ddp":
        choices = [(devices, 1)]
    elif devices <= units:
        choices = [(1, devices)]
    else:
        choices = [(devices // stages, stages) for stages in range(2, units + 1)]
    predictions = []
    for replicas, stages in choices:
        if replicas < 1 or not 1 <= stages <= units or replicas * stages > devices:
            raise ValueError(f"{replicas} replicas of {stages} stages fit neither {devices} devices nor {units} units")
        predictions.append(
            _predict(profile, method, devices, replicas, stages, cluster, micro_batches, optimizer_states, split)
        )
    fitting = [prediction for prediction in predictions if prediction.rejected is None]
    return max(fitting or predictions, key=lambda prediction: prediction.images_per_second)


def split_units(profile: Profile, method: str, stages: int) -> list[range]:
    """The units of each stage, balanced by the method's own cost."""
    work = _work(method)
    last = "graph" if method in ASYNCHRONOUS else work
    costs, last_costs = ([unit.seconds(kind) for unit in profile.units] for kind in (work, last))
    return _ranges(balance(costs, stages, last_stage_costs=last_costs))


def _ranges(split: Sequence[int]) -> list[range]:
    return [range(a, b) for a, b in pairwise([0, *accumulate(split)])]


def _predict(
    profile: Profile,
    method: str,
    devices: int,
    replicas: int,
    stages: int,
    cluster: Cluster,
    micro_batches: int,
    optimizer_states: int,
    split: Sequence[int] | None,
) -> Prediction:
    owned = split_units(profile, method, stages) if split is None else _ranges(split)
    parts = [[profile.units[i] for i in units] for units in owned]
    per_replica = -(-micro_batches // replicas)
    scale = micro_batches / (replicas * per_replica)  # the same images per update on every layout
    links = [_link(method, part[-1]) for part in parts[:-1]]
    parameters = [sum(unit.parameter_bytes for unit in part) for part in parts]
    all_reduce = [cluster.all_reduce_seconds(size, replicas) if replicas > 1 else 0.0 for size in parameters]
    seconds = _update_seconds(method, parts, per_replica, scale, links, all_reduce, cluster)
    images_per_second = micro_batches * profile.batch_size / seconds
    alone = profile.batch_size / sum(profile.costs("backprop"))
    memory = tuple(
        stage_memory(
            method,
            part,
            j,
            stages,
            per_replica,
            optimizer_states=optimizer_states,
            replicas=replicas,
            scale=scale,
        )
        for j, part in enumerate(parts)
    )
    return Prediction(
        method=method,
        devices=devices,
        replicas=replicas,
        stages=stages,
        split=tuple(map(len, owned)),
        micro_batches=per_replica,
        images_per_second=images_per_second,
        efficiency=images_per_second / (devices * alone),
        links=tuple(Link(round(link.up * scale), round(link.down * scale)) for link in links),
        all_reduce=tuple(2 * (replicas - 1) * size // replicas for size in parameters),
        memory=memory,
        delay=tuple(2 * (stages - 1 - j) if method in ASYNCHRONOUS else 0 for j in range(stages)),
        rejected=_rejection(memory, cluster.memory),
    )


def _update_seconds(
    method: str,
    parts: Sequence[Sequence[UnitProfile]],
    micro_batches: int,
    scale: float,
    links: Sequence[Link],
    all_reduce: Sequence[float],
    cluster: Cluster,
) -> float:
    up = [cluster.seconds(link.up * scale) for link in links]
    down = [cluster.seconds(link.down * scale) for link in links]
    if method in ASYNCHRONOUS:
        works: list[Work] = [_work(method)] * (len(parts) - 1) + ["graph"]
        costs = [sum(unit.seconds(work) for unit in part) * scale for part, work in zip(parts, works, strict=True)]
        costs = [cost + seconds / micro_batches for cost, seconds in zip(costs, all_reduce, strict=True)]
        return micro_batches * tick_seconds(costs, up, down)
    rerun = method == "1f1b+checkpoint"
    forward = [sum(u.forward if rerun else u.graph_forward for u in part) * scale for part in parts]
    backward = [sum(u.seconds(_work(method)) for u in part) * scale - f for part, f in zip(parts, forward, strict=True)]
    if method == "ddp":  # the all-reduce of an update hides behind its last backward
        return micro_batches * (forward[0] + backward[0]) + max(0.0, all_reduce[0] - backward[0])
    make = gpipe if method == "gpipe" else one_forward_one_backward
    return update_seconds(make(len(parts), micro_batches), forward, backward, up, down) + max(all_reduce)


def _work(method: str) -> Work:
    return _SYNCHRONOUS_WORK[method] if method in _SYNCHRONOUS_WORK else WORK[method]


def _link(method: str, below: UnitProfile) -> Link:
    """What crosses the link above a unit: streams up, gradients down; PETRA's stages reconstruct from the streams."""
    size = below.output_bytes
    return Link(size, 2 * size if method == "petra" and below.reversible else size)


def _rejection(memory: Sequence[Memory], limit: float | None) -> str | None:
    worst = max(range(len(memory)), key=lambda j: memory[j].total)
    if limit is None or memory[worst].total <= limit:
        return None
    name, size = memory[worst].largest()
    total = format_bytes(memory[worst].total)
    return f"stage {worst} needs {total} of {format_bytes(limit)}, {format_bytes(size)} of them {name}"
