"""Ways to train one reversible network on one or several processes: ours beside torch's.

Every contender trains the same network from the same weights on the same micro-batches, and an update is the mean
gradient of m micro-batches (of k = m for ours) and one step of SGD. A contender is built and updated by every process
of a world; processes it has no work for do nothing. The names are what results.json calls them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from petra_zoo.models import PetraPaperRevNet
from petra_zoo.petra import Costs, Layout, Optimization, Pipeline, Profile, Wire, World
from petra_zoo.petra.messages import Down, Up
from petra_zoo.planning.performance import split_units


@dataclass(frozen=True)
class Task:
    """The network and its data: stem, `blocks` reversible blocks of fixed width, head.

    Attributes:
        batch_size: images per micro-batch.
    """

    blocks: int = 24
    channels: int = 32
    size: int = 32
    batch_size: int = 8
    classes: int = 10

    def model(self) -> PetraPaperRevNet:
        """The same weights at every call."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return PetraPaperRevNet((self.blocks,), (self.channels,), stem_type="cifar", num_classes=self.classes)


@cache
def data(task: Task, micro_batches: int) -> tuple[Tensor, Tensor]:
    """Images [m * batch, 3, size, size] and labels of an update, the same tensors at every call."""
    images, labels = [], []
    for number in range(micro_batches):
        generator = torch.Generator().manual_seed(1 + number)
        images.append(torch.randn(task.batch_size, 3, task.size, task.size, generator=generator))
        labels.append(torch.randint(0, task.classes, (task.batch_size,), generator=generator))
    return torch.cat(images), torch.cat(labels)


class Contender:
    """What trains. `update()` runs one update and gives the micro-batches' losses that this process sees.

    Attributes:
        images: per update, of all processes together.
    """

    images: int

    def update(self) -> list[float]:
        raise NotImplementedError


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)


class Alone(Contender):
    """Accumulated backpropagation in one process, in several that do not know each other, or in DDP's replicas.

    Args:
        memory: of the model: ``'plain'`` or ``'reversible'``.
        processes: how many of them work.
        threads: of each.
        ddp: they share the micro-batches and average their gradients.
    """

    def __init__(
        self,
        task: Task,
        model: PetraPaperRevNet,
        world: World,
        m: int,
        *,
        memory: str = "plain",
        processes: int = 1,
        threads: int = 1,
        ddp: bool = False,
    ) -> None:
        self.works = world.rank < processes
        self.threads = threads
        self.images = m * task.batch_size * (1 if ddp else processes)
        model.train().set_memory(memory)
        self.model: nn.Module = DistributedDataParallel(model) if ddp else model
        self.optimizer = sgd(model.parameters())
        images, labels = data(task, m)
        mine = slice(world.rank, None, world.size) if ddp else slice(None)
        pairs = zip(images.split(task.batch_size), labels.split(task.batch_size), strict=True)
        self.micro_batches = list(pairs)[mine]

    def update(self) -> list[float]:
        if not self.works:
            return []
        torch.set_num_threads(self.threads)
        losses = []
        for i, (images, labels) in enumerate(self.micro_batches):
            last = i == len(self.micro_batches) - 1
            waits = isinstance(self.model, DistributedDataParallel) and not last
            with self.model.no_sync() if waits else nullcontext():  # type: ignore[operator]
                loss = F.cross_entropy(self.model(images), labels)
                (loss / len(self.micro_batches)).backward()
            losses.append(float(loss.detach()))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        torch.set_num_threads(1)
        return losses


class TorchStage(nn.Module):
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


class TorchSchedule(Contender):
    """A schedule of torch.distributed.pipelining, static shapes, split by its own cost."""

    def __init__(
        self,
        task: Task,
        model: PetraPaperRevNet,
        world: World,
        m: int,
        *,
        profile: Profile,
        schedule: type[ScheduleGPipe] | type[Schedule1F1B],
        method: str,
    ) -> None:
        self.images = m * task.batch_size
        self.world = world
        split = split_units(profile, method, world.size)
        self.split = [len(owned) for owned in split]
        units = model.train().units()
        self.module = TorchStage([units[i] for i in split[world.rank]], checkpointed=method.endswith("checkpoint"))
        self.optimizer = sgd(self.module.parameters())
        n, c, size = task.batch_size, task.channels, task.size
        boundary = tuple(torch.empty(n, c, size, size, requires_grad=True) for _ in range(2))
        stage = PipelineStage(
            self.module,
            world.rank,
            world.size,
            torch.device("cpu"),
            input_args=(torch.empty(n, 3, size, size),) if world.first else boundary,
            output_args=(torch.empty(n, task.classes, requires_grad=True),) if world.last else boundary,
            group=world.up,
        )
        self.schedule = schedule(stage, m, loss_fn=F.cross_entropy)
        self.data = data(task, m)

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


class Ours(Contender):
    """`petra_zoo.petra.Pipeline`, one stage per process; an update is k ticks of a pipeline that never drains."""

    def __init__(
        self, task: Task, model: PetraPaperRevNet, world: World, m: int, *, profile: Profile, method: str
    ) -> None:
        self.images = m * task.batch_size
        self.world = world
        self.pipeline = Pipeline(
            model.train(),
            Layout.of(model, world.size, method=method, ranks=world.size, costs=Costs.measured(profile, method)),
            method=method,
            optimization=Optimization(lambda named: sgd([p for _, p in named]), accumulation_steps=m),
            world=replace(world, wire=Wire(timeout=600.0)),
        )
        self.split = self.pipeline.layout.sizes
        images, labels = data(task, m)
        self.micro_batches = list(zip(images.split(task.batch_size), labels.split(task.batch_size), strict=True))

    def update(self) -> list[float]:
        losses = []
        for images, labels in self.micro_batches:
            output = self.pipeline.step(images, labels) if self.world.first else self.pipeline.step()
            losses += [] if output.loss is None else [float(output.loss)]
        return losses


class WithoutLinks(Contender):
    """The stages of `Ours` at the same work on one message over and over: what a tick would take without links."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        ours = Ours(*args, **kwargs)
        self.images, self.ticks = ours.images, len(ours.micro_batches)
        self.pipeline = ours.pipeline
        (self.stage,) = self.pipeline.stages
        images, labels = ours.micro_batches[0]
        task: Task = args[0]
        shape = (task.batch_size, task.channels, task.size, task.size)
        streams = (images,) if ours.world.first else (torch.randn(shape), torch.randn(shape))
        self.up = Up(0, streams, labels)
        self.down: Down | None = None
        if not ours.world.last:
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


Make = Callable[[Task, PetraPaperRevNet, World], Contender]


def contenders(profile: Profile, ms: Sequence[int]) -> dict[str, Make]:
    """Every contender by name. Baselines on one device run at the first m, which their speed does not depend on."""
    made: dict[str, Make] = {}

    def add(name: str, kind: type[Contender], m: int, **kwargs: Any) -> None:
        def make(task: Task, model: PetraPaperRevNet, world: World) -> Contender:
            # Groups of its own: a pipeline that rests has receives posted.
            own = replace(world, up=dist.new_group(), down=dist.new_group())
            return kind(task, model, own, m, **kwargs)

        made[name] = make

    first = ms[0]
    add("backprop, 1 thread", Alone, first)
    add("backprop, 2 threads", Alone, first, threads=2)
    add("reversible", Alone, first, memory="reversible")
    add("capacity", Alone, first, processes=2)
    for m in ms:
        add(f"DDP x 2, m={m}", Alone, m, processes=2, ddp=True)
        add(f"GPipe, m={m}", TorchSchedule, m, profile=profile, schedule=ScheduleGPipe, method="gpipe")
        add(f"1F1B, m={m}", TorchSchedule, m, profile=profile, schedule=Schedule1F1B, method="1f1b")
        add(
            f"1F1B + checkpointing, m={m}",
            TorchSchedule,
            m,
            profile=profile,
            schedule=Schedule1F1B,
            method="1f1b+checkpoint",
        )
        for method in ("petra", "dsp", "delayed"):
            add(f"{method}, k={m}", Ours, m, profile=profile, method=method)
    add(f"petra without links, k={ms[-1]}", WithoutLinks, ms[-1], profile=profile, method="petra")
    return made
