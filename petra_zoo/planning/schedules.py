"""What devices can do with a network: PETRA and its ancestors, which never drain, or a synchronous schedule.

Each says what work its stages do, what they keep and what they send, in the terms in which a method of the engine says
it; time and memory follow. A method that is registered with the engine is a schedule here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from petra_zoo.errors import UserError
from petra_zoo.petra.footprint import Footprint, Keeps, keeps_graphs, keeps_unit_inputs
from petra_zoo.petra.methods import METHODS, Method
from petra_zoo.petra.unit_profile import UnitProfile, Work
from petra_zoo.planning.cluster import Cluster, Link
from petra_zoo.planning.durations import Operation, gpipe, one_forward_one_backward, tick_seconds, update_seconds
from petra_zoo.planning.replica import PlannedStage, Replica
from petra_zoo.planning.stage_memory import StageMemory


class Schedule(ABC):
    """What each of several devices does, and when.

    Attributes:
        name: what people call it.
        work: of a stage for a micro-batch.
    """

    name: str
    work: Work

    @property
    def last_work(self) -> Work:
        """Of the last stage."""
        return self.work

    @abstractmethod
    def update_seconds(self, replica: Replica, cluster: Cluster) -> float:
        """Seconds of an update, in the long run."""

    @abstractmethod
    def footprint(self, replica: Replica, stage: PlannedStage) -> Footprint:
        """What a stage holds of the micro-batches in flight, at the profile's size of a micro-batch."""

    @abstractmethod
    def messages(self, replica: Replica, stage: PlannedStage) -> int:
        """Bytes of messages that a stage holds, likewise."""

    @abstractmethod
    def gradient_copies(self, replica: Replica) -> int:
        """How often a stage's gradients are there."""

    def delay(self, replica: Replica) -> tuple[float, ...]:
        """D_j of each stage: how many updates old its gradients are."""
        return (0.0,) * len(replica.stages)

    def link(self, below: UnitProfile) -> Link:
        """What crosses the link above a unit: streams up, gradients down."""
        return Link(below.output_bytes, below.output_bytes)

    def factorisations(self, devices: int, units: int) -> list[tuple[int, int]]:
        """Choices of (replicas, stages): one pipeline over all devices, or, with more devices than units, several."""
        if devices <= units:
            return [(1, devices)]
        return [(devices // stages, stages) for stages in range(2, units + 1)]

    def memory(self, replica: Replica, stage: PlannedStage, optimizer_states: int) -> StageMemory:
        """Peak bytes of a stage's device; `optimizer_states` numbers per parameter."""
        held = self.footprint(replica, stage)
        return StageMemory(
            parameters=stage.parameters,
            gradients=self.gradient_copies(replica) * stage.parameters,
            optimizer=optimizer_states * stage.parameters,
            graphs=round(held.graphs * replica.scale),
            inputs=round(held.inputs * replica.scale),
            versions=held.versions,
            messages=round(self.messages(replica, stage) * replica.scale),
        )


class Continuous(Schedule):
    """A method of the engine: a pipeline that never drains, in which gradients are old.

    Args:
        method: with a delay, and with what it keeps.
    """

    def __init__(self, method: Method) -> None:
        assert method.keeps is not None
        self.method, self.keeps = method, method.keeps
        self.name, self.work = method.name, method.work

    @property
    def last_work(self) -> Work:
        return self.method.last_work

    def update_seconds(self, replica: Replica, cluster: Cluster) -> float:
        costs = []
        for stage in replica.stages:
            work = self.last_work if stage.last else self.work
            cost = sum(unit.seconds(work) for unit in stage.units) * replica.scale
            costs.append(cost + _all_reduce(replica, stage, cluster) / replica.micro_batches)
        return replica.micro_batches * tick_seconds(costs, *_link_seconds(self, replica, cluster))

    def footprint(self, replica: Replica, stage: PlannedStage) -> Footprint:
        ticks = 2 * (len(replica.stages) - 1 - stage.index)  # between the forward and the backward of a micro-batch
        keeps = keeps_graphs if stage.last and self.method.last_stage_keeps_graph else self.keeps
        return keeps(stage.units, ticks + 1, -(-ticks // replica.micro_batches) + 1)

    def messages(self, replica: Replica, stage: PlannedStage) -> int:
        # Links receive into two pieces of memory in turn, and send out of one.
        held = 3 * (stage.received + stage.sent) + self.method.streams_travel * stage.received
        if not self.method.streams_travel or stage.last:
            return held
        # Streams come down beside the gradients; both walk through the stage in tensors of its own.
        top = stage.units[-1]
        return held + 2 * top.reversible * stage.sent + 2 * max(unit.output_bytes for unit in stage.units)

    def gradient_copies(self, replica: Replica) -> int:
        return 2 if replica.micro_batches > 1 else 1  # the window's sum, and a micro-batch's own

    def delay(self, replica: Replica) -> tuple[float, ...]:
        return self.method.delay(len(replica.stages), replica.micro_batches)

    def link(self, below: UnitProfile) -> Link:
        size = below.output_bytes
        return Link(size, 2 * size if self.method.streams_travel and below.reversible else size)


@dataclass(frozen=True)
class Flushed(Schedule):
    """A synchronous pipeline: an update begins when the one before has left it.

    Attributes:
        keeps: what a stage keeps of each micro-batch.
        order: (stages, micro-batches of an update) -> operations of each stage, in order.
        in_flight: (stages, stage, micro-batches) -> how many a stage keeps at most.
    """

    name: str
    work: Work
    keeps: Keeps
    order: Callable[[int, int], list[list[Operation]]]
    in_flight: Callable[[int, int, int], int]

    def update_seconds(self, replica: Replica, cluster: Cluster) -> float:
        forward, backward = _both_ways(self.work, replica)
        orders = self.order(len(replica.stages), replica.micro_batches)
        seconds = update_seconds(orders, forward, backward, *_link_seconds(self, replica, cluster))
        return seconds + max(_all_reduce(replica, stage, cluster) for stage in replica.stages)

    def footprint(self, replica: Replica, stage: PlannedStage) -> Footprint:
        return self.keeps(stage.units, self._kept(replica, stage), 1)

    def messages(self, replica: Replica, stage: PlannedStage) -> int:
        # The losses that torch's schedules keep hold on to what the last stage received, of every micro-batch.
        kept = replica.micro_batches if stage.last else self._kept(replica, stage)
        return kept * stage.received + stage.sent

    def gradient_copies(self, replica: Replica) -> int:
        return 1

    def _kept(self, replica: Replica, stage: PlannedStage) -> int:
        return self.in_flight(len(replica.stages), stage.index, replica.micro_batches)


class DataParallel(Schedule):
    """DistributedDataParallel: every device has the whole network."""

    name = "ddp"
    work: Work = "graph"

    def update_seconds(self, replica: Replica, cluster: Cluster) -> float:
        (forward,), (backward,) = _both_ways(self.work, replica)
        all_reduce = _all_reduce(replica, replica.stages[0], cluster)
        # The all-reduce of an update hides behind its last backward.
        return replica.micro_batches * (forward + backward) + max(0.0, all_reduce - backward)

    def footprint(self, replica: Replica, stage: PlannedStage) -> Footprint:
        return keeps_graphs(stage.units, 1, 1)

    def messages(self, replica: Replica, stage: PlannedStage) -> int:
        return 0

    def gradient_copies(self, replica: Replica) -> int:
        return 2 if replica.replicas > 1 else 1  # DistributedDataParallel's buckets

    def factorisations(self, devices: int, units: int) -> list[tuple[int, int]]:
        return [(devices, 1)]


def _runs_ahead(stages: int, stage: int, micro_batches: int) -> int:
    return min(micro_batches, stages - stage)


SYNCHRONOUS: tuple[Schedule, ...] = (
    Flushed("1f1b", "graph", keeps_graphs, one_forward_one_backward, _runs_ahead),
    Flushed("1f1b+checkpoint", "rerun", keeps_unit_inputs, one_forward_one_backward, _runs_ahead),
    Flushed("gpipe", "graph", keeps_graphs, gpipe, lambda stages, stage, micro_batches: micro_batches),
    DataParallel(),
)


def all_schedules() -> dict[str, Schedule]:
    """All that can be predicted, by name: the engine's methods that say what they keep, then the synchronous ones."""
    methods = [Continuous(method) for method in METHODS.values() if method.delayed and method.keeps is not None]
    return {schedule.name: schedule for schedule in (*methods, *SYNCHRONOUS)}


def find_schedule(name: str) -> Schedule:
    """The schedule of a name.

    Raises:
        UserError: there is none.
    """
    known = all_schedules()
    if name not in known:
        raise UserError(f"method is one of {', '.join(known)}, not {name!r}")
    return known[name]


def _link_seconds(schedule: Schedule, replica: Replica, cluster: Cluster) -> tuple[list[float], list[float]]:
    """Of each link between neighbours, a message up and a message down."""
    links = [schedule.link(stage.units[-1]) for stage in replica.stages[:-1]]
    return (
        [cluster.seconds(link.up * replica.scale) for link in links],
        [cluster.seconds(link.down * replica.scale) for link in links],
    )


def _both_ways(work: Work, replica: Replica) -> tuple[Sequence[float], Sequence[float]]:
    """Seconds of each stage's forward and backward of a micro-batch."""
    forward, backward = [], []
    for stage in replica.stages:
        forward.append(sum(unit.forward_seconds(work) for unit in stage.units) * replica.scale)
        backward.append(sum(unit.seconds(work) for unit in stage.units) * replica.scale - forward[-1])
    return forward, backward


def _all_reduce(replica: Replica, stage: PlannedStage, cluster: Cluster) -> float:
    return cluster.all_reduce_seconds(stage.parameters, replica.replicas) if replica.replicas > 1 else 0.0
