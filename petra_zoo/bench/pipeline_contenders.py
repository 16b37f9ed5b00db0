"""Ways to train one reversible network on one or several processes: ours beside torch's.

Every contender trains the same network from the same weights on the same micro-batches, and an update is the mean
gradient of m micro-batches (of k = m for ours) and one step of SGD. A contender is built and updated by every process
of a world; processes it has no work for do nothing. Stages are balanced by operation counts, each contender's by what
it does with the units: the same split on every machine.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cache

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from petra_zoo.bench.pipeline_jobs import PipelineTask
from petra_zoo.models import PetraPaperRevNet
from petra_zoo.petra import Layout, Optimization, Pipeline, Wire, World
from petra_zoo.petra.channels import open_channels
from petra_zoo.petra.messages import Down, Up
from petra_zoo.petra.world import START_TIMEOUT


def build_network(task: PipelineTask) -> PetraPaperRevNet:
    """The same weights at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return PetraPaperRevNet((task.blocks,), (task.channels,), stem_type="cifar", num_classes=task.classes)


@cache
def task_data(task: PipelineTask, m: int) -> tuple[Tensor, Tensor]:
    """Images [m * batch, 3, size, size] and labels of an update, the same tensors at every call."""
    images, labels = [], []
    for number in range(m):
        generator = torch.Generator().manual_seed(1 + number)
        images.append(torch.randn(task.batch_size, *task.input_size, generator=generator))
        labels.append(torch.randint(0, task.classes, (task.batch_size,), generator=generator))
    return torch.cat(images), torch.cat(labels)


def _micro_batches(task: PipelineTask, m: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    images, labels = (x.to(device) for x in task_data(task, m))
    return list(zip(images.split(task.batch_size), labels.split(task.batch_size), strict=True))


class PipelineContender(ABC):
    """What trains.

    Attributes:
        images: per update, of all processes together.
        split: units of each process, where units are divided.
    """

    images: int
    split: Sequence[int] | None = None

    @abstractmethod
    def update(self) -> list[float]:
        """Runs one update; gives the micro-batches' losses that this process sees."""


def _sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)


class _Backpropagation(PipelineContender):
    """Accumulated backpropagation in one process, in several that do not know each other, or in DDP's replicas.

    Args:
        memory: of the model: ``'plain'`` or ``'reversible'``.
        processes: how many of them work.
        threads: of each.
        ddp: they share the micro-batches and average their gradients.
    """

    def __init__(
        self,
        task: PipelineTask,
        model: PetraPaperRevNet,
        world: World,
        m: int,
        *,
        reversible: bool = False,
        processes: int = 1,
        threads: int = 1,
        ddp: bool = False,
    ) -> None:
        self.works = world.rank < processes
        self.threads = threads
        self.images = m * task.batch_size * (1 if ddp else processes)
        model.train().set_memory("reversible" if reversible else "plain")
        model.to(world.device)
        self.model: nn.Module = DistributedDataParallel(model) if ddp else model
        self.optimizer = _sgd(model.parameters())
        mine = slice(world.rank, None, world.size) if ddp else slice(None)
        self.micro_batches = _micro_batches(task, m, world.device)[mine]

    def update(self) -> list[float]:
        if not self.works:
            return []
        torch.set_num_threads(self.threads)
        losses = []
        for i, (images, labels) in enumerate(self.micro_batches):
            waits = i < len(self.micro_batches) - 1  # gradients travel with the last micro-batch's
            alone = self.model.no_sync() if waits and isinstance(self.model, DistributedDataParallel) else nullcontext()
            with alone:
                loss = F.cross_entropy(self.model(images), labels)
                (loss / len(self.micro_batches)).backward()
            losses.append(float(loss.detach()))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        torch.set_num_threads(1)
        return losses


class _TorchStage(nn.Module):
    """Consecutive units as a module of torch.distributed.pipelining."""

    def __init__(self, units: Sequence[nn.Module], checkpointed: bool) -> None:
        super().__init__()
        self.units = nn.ModuleList(units)
        self.checkpointed = checkpointed

    def forward(self, *streams: Tensor) -> Tensor | tuple[Tensor, ...]:
        for unit in self.units:
            streams = checkpoint(unit, *streams, use_reentrant=False) if self.checkpointed else unit(*streams)
        streams = tuple(x.contiguous() for x in streams)  # the stem's are halves of one tensor; gloo sends whole ones
        return streams[0] if len(streams) == 1 else streams


class _TorchSchedule(PipelineContender):
    """A schedule of torch.distributed.pipelining, with static shapes."""

    def __init__(
        self,
        task: PipelineTask,
        model: PetraPaperRevNet,
        world: World,
        m: int,
        *,
        schedule: type[ScheduleGPipe] | type[Schedule1F1B],
        checkpointed: bool = False,
    ) -> None:
        self.images = m * task.batch_size
        self.world = world
        # A checkpointed unit costs a forward more, the last stage's too: in all stages alike, so the split is the same.
        layout = Layout.of(model, world.size, method="backprop", ranks=world.size, input_size=task.input_size)
        self.split = layout.sizes
        units = model.train().units()
        self.module = _TorchStage([units[i] for i in layout.units_of_rank(world.rank)], checkpointed)
        self.optimizer = _sgd(self.module.parameters())
        n, c, size = task.batch_size, task.channels, task.img_size
        self.module.to(world.device)
        boundary = tuple(torch.empty(n, c, size, size, requires_grad=True, device=world.device) for _ in range(2))
        stage = PipelineStage(
            self.module,
            world.rank,
            world.size,
            world.device,
            input_args=(torch.empty(n, 3, size, size, device=world.device),) if world.first else boundary,
            output_args=(torch.empty(n, task.classes, requires_grad=True, device=world.device),)
            if world.last
            else boundary,
            group=world.pipe,
        )
        self.schedule = schedule(stage, m, loss_fn=F.cross_entropy)
        self.data = tuple(x.to(world.device) for x in task_data(task, m))

    def update(self) -> list[float]:
        images, labels = self.data
        losses: list[Tensor] = []
        if self.world.first:
            self.schedule.step(images, return_outputs=False)
        elif self.world.last:
            self.schedule.step(target=labels, losses=losses, return_outputs=False)
        else:
            self.schedule.step(return_outputs=False)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return [float(loss.detach()) for loss in losses]


class _Ours(PipelineContender):
    """`petra_zoo.petra.Pipeline`, one stage per process; an update is k ticks of a pipeline that never drains."""

    def __init__(self, task: PipelineTask, model: PetraPaperRevNet, world: World, m: int, *, method: str) -> None:
        self.images = m * task.batch_size
        self.world = world
        self.pipeline = Pipeline(
            model.train(),
            Layout.of(model, world.size, method=method, ranks=world.size, input_size=task.input_size),
            method=method,
            optimization=Optimization(lambda named: _sgd(p for _, p in named), accumulation_steps=m),
            world=replace(world, wire=Wire(timeout=600.0)),
        )
        self.split = self.pipeline.layout.sizes
        self.micro_batches = _micro_batches(task, m, world.device)

    def update(self) -> list[float]:
        losses = []
        for images, labels in self.micro_batches:
            output = self.pipeline.step(images, labels) if self.world.first else self.pipeline.step()
            losses += [] if output.loss is None else [float(output.loss)]
        return losses


class _WithoutLinks(PipelineContender):
    """The stages of `_Ours` at the same work on one message over and over: what a tick would take without links."""

    def __init__(self, task: PipelineTask, model: PetraPaperRevNet, world: World, m: int, *, method: str) -> None:
        ours = _Ours(task, model, world, m, method=method)
        self.images, self.split, self.ticks = ours.images, ours.split, m
        self.pipeline = ours.pipeline
        (self.stage,) = self.pipeline.stages
        images, labels = ours.micro_batches[0]
        shape = (task.batch_size, task.channels, task.img_size, task.img_size)
        streams = (images,) if world.first else tuple(torch.randn(shape, device=world.device) for _ in range(2))
        self.up = Up(0, streams, labels)
        self.down: Down | None = None
        if not world.last:
            outputs = self.stage.forward(self.up).streams  # fills the FIFOs by one, as a delay of one tick would
            self.down = Down(0, outputs, tuple(torch.randn_like(x) / 100 for x in outputs))

    def update(self) -> list[float]:
        for _ in range(self.ticks):
            if self.down is None:
                self.stage.forward_backward(self.up)
            else:
                self.stage.forward(self.up)
                self.stage.backward(self.down)
            self.stage.update()
        return []


def make_contender(name: str, task: PipelineTask, model: PetraPaperRevNet, world: World, m: int) -> PipelineContender:
    """A contender of `petra_zoo.bench.pipeline`, in every process of a world; m: micro-batches of an update."""
    # Groups of its own: a pipeline that rests has receives posted.
    pipe = dist.new_group()
    assert isinstance(pipe, dist.ProcessGroup)
    channels = open_channels([world.peers], world.device, world.nccl, START_TIMEOUT)
    world = replace(world, channels=channels, pipe=pipe)
    place = (task, model, world, m)
    match name:
        case "backprop, 1 thread":
            return _Backpropagation(*place)
        case "backprop, 2 threads":
            return _Backpropagation(*place, threads=2)
        case "reversible":
            return _Backpropagation(*place, reversible=True)
        case "capacity":
            return _Backpropagation(*place, processes=2)
        case "DDP" | "DDP x 2":
            return _Backpropagation(*place, processes=world.size, ddp=True)
        case "GPipe":
            return _TorchSchedule(*place, schedule=ScheduleGPipe)
        case "1F1B":
            return _TorchSchedule(*place, schedule=Schedule1F1B)
        case "1F1B + checkpointing":
            return _TorchSchedule(*place, schedule=Schedule1F1B, checkpointed=True)
        case "petra without links":
            return _WithoutLinks(*place, method="petra")
        case method:
            return _Ours(*place, method=method)
