"""The performance model behind `petra-zoo plan`: what a method would do on devices that are not here.

From a profile of the units and the links' bandwidth and latency it predicts, for one stage per device: images per
second, what crosses every link, what every device holds, and how old gradients are. Not modelled: the optimizer's
step, data loading, and devices that slow each other down (measure the profile under the load it will see).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from petra_zoo.errors import UserError
from petra_zoo.petra.layout import balance, consecutive
from petra_zoo.petra.profile import Profile
from petra_zoo.planning.cluster import Cluster, Link
from petra_zoo.planning.quantities import format_bytes
from petra_zoo.planning.replica import Replica
from petra_zoo.planning.schedules import Schedule, find_schedule
from petra_zoo.planning.stage_memory import StageMemory


@dataclass(frozen=True)
class Forecast:
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
        delay: D_j of each stage: how many updates old its gradients are.
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
    memory: tuple[StageMemory, ...]
    delay: tuple[float, ...]
    rejected: str | None


def forecast(
    profile: Profile,
    method: str,
    devices: int,
    cluster: Cluster,
    *,
    micro_batches: int = 8,
    optimizer_states: int = 1,
    factorisation: tuple[int, int] | None = None,
    split: Sequence[int] | None = None,
) -> Forecast:
    """Predicts one method on a number of devices.

    Args:
        profile: of the model's units at the micro-batch size.
        method: one of `petra_zoo.planning.schedules.all_schedules()`.
        devices: how many there are.
        cluster: their links and memory.
        micro_batches: images of an update over the profile's batch size, of all replicas together.
        optimizer_states: numbers of state per parameter.
        factorisation: (replicas D, stages p). Default: one pipeline over all devices; with more devices than units
            the fastest that fits the memory.
        split: units per stage of one pipeline over all devices; default: balanced by the method's own cost.

    Raises:
        UserError: an unknown method, or numbers that do not fit.
    """
    schedule = find_schedule(method)
    if devices < 1 or micro_batches < 1:
        raise UserError(f"devices={devices} and micro_batches={micro_batches} must be at least 1")
    units = len(profile.units)
    if split is not None and (len(split) != devices or sum(split) != units or min(split) < 1):
        raise UserError(f"split={list(split)} must be {devices} positive numbers that add up to {units} units")
    predictions = []
    for replicas, stages in [factorisation] if factorisation else schedule.factorisations(devices, units):
        if replicas < 1 or not 1 <= stages <= units or replicas * stages > devices:
            raise UserError(f"{replicas} replicas of {stages} stages fit neither {devices} devices nor {units} units")
        owned = consecutive(split) if split is not None else split_units(profile, method, stages)
        per_replica = -(-micro_batches // replicas)
        scale = micro_batches / (replicas * per_replica)  # the same images per update on every layout
        parts = tuple(tuple(profile.units[i] for i in units_of_stage) for units_of_stage in owned)
        replica = Replica(parts, per_replica, replicas, scale)
        images = micro_batches * profile.batch_size
        predictions.append(_forecast(schedule, replica, devices, cluster, profile, images, optimizer_states))
    fitting = [prediction for prediction in predictions if prediction.rejected is None]
    return max(fitting or predictions, key=lambda prediction: prediction.images_per_second)


def split_units(profile: Profile, method: str, stages: int) -> list[range]:
    """The units of each stage, balanced by the method's own cost."""
    schedule = find_schedule(method)
    each, in_last = ([u.seconds(work) for u in profile.units] for work in (schedule.work, schedule.last_work))
    return consecutive(balance(each, stages, last_stage_costs=in_last))


def _forecast(
    schedule: Schedule,
    replica: Replica,
    devices: int,
    cluster: Cluster,
    profile: Profile,
    images: int,
    optimizer_states: int,
) -> Forecast:
    """One factorisation; `images` are those of an update."""
    images_per_second = images / schedule.update_seconds(replica, cluster)
    alone = profile.batch_size / sum(profile.costs("backprop"))
    memory = tuple(schedule.memory(replica, stage, optimizer_states) for stage in replica.stages)
    links = [schedule.link(stage.units[-1]) for stage in replica.stages[:-1]]
    d, scale = replica.replicas, replica.scale
    return Forecast(
        method=schedule.name,
        devices=devices,
        replicas=d,
        stages=len(replica.stages),
        split=tuple(map(len, replica.parts)),
        micro_batches=replica.micro_batches,
        images_per_second=images_per_second,
        efficiency=images_per_second / (devices * alone),
        links=tuple(Link(round(link.up * scale), round(link.down * scale)) for link in links),
        all_reduce=tuple(2 * (d - 1) * stage.parameters // d for stage in replica.stages),
        memory=memory,
        delay=schedule.delay(replica),
        rejected=_rejection(memory, cluster.memory),
    )


def _rejection(memory: Sequence[StageMemory], limit: float | None) -> str | None:
    worst = max(range(len(memory)), key=lambda j: memory[j].total)
    if limit is None or memory[worst].total <= limit:
        return None
    name, size = memory[worst].largest()
    total = format_bytes(memory[worst].total)
    return f"stage {worst} needs {total} of {format_bytes(limit)}, {format_bytes(size)} of them {name}"
