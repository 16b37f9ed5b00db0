"""The pipeline: J stages, one clock.

In every tick each stage runs the forward of a young micro-batch and the backward of an older one (section 3 of arXiv
2406.02052). Micro-batch n is fed at tick n, reaches the head at tick n + J - 1 and stage i (from 0) goes backward
through it at tick n + 2 (J - 1) - i. Nothing sent in a tick is received in the same tick.

The exact controls `backprop` and `reversible` run the same stages without delay: up and down within one tick.

One process runs all stages, or each of several ranks runs some of them (`world`): the same tick, the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from petra_zoo.petra.ancestors import BufferedStage, GraphStage
from petra_zoo.petra.clock import Clock
from petra_zoo.petra.gather import keep_only, whole_model
from petra_zoo.petra.links import Links, Wire
from petra_zoo.petra.local import LocalStage, output_widths
from petra_zoo.petra.messages import Down, Up
from petra_zoo.petra.partition import (
    COST,
    COST_WITHOUT_RECOMPUTATION,
    Costs,
    counted_costs,
    owners,
    partition,
)
from petra_zoo.petra.pipeline_state import restore, state_of
from petra_zoo.petra.probes import Probe
from petra_zoo.petra.process_links import ProcessLinks
from petra_zoo.petra.profile import Profile
from petra_zoo.petra.stage import Loss, Settings, Stage
from petra_zoo.petra.world import World
from petra_zoo.reversible import Unit

Method = Literal["petra", "dsp", "delayed", "local", "backprop", "reversible"]
METHODS: tuple[Method, ...] = ("petra", "dsp", "delayed", "local", "backprop", "reversible")
EXACT: tuple[Method, ...] = ("backprop", "reversible")
NamedParameters = list[tuple[str, nn.Parameter]]
EVALUATION_TAG = 64


@dataclass
class Output:
    """What a tick gives: the micro-batch that reached the head.

    None everywhere while the pipeline fills, and on ranks that do not own the head.
    """

    micro_batch: int | None = None
    loss: Tensor | None = None
    logits: Tensor | None = None
    labels: Tensor | None = None


class Pipeline:
    """Trains a model cut into stages.

    In one process the model's own parameters and buffers are the live ones: they can be read, saved or evaluated at any
    time. A rank of several keeps its own stages' only, on its device; the others move to the meta device.

    Args:
        model: a model with `units()`, in train mode; every `petra_*` model has them. Every rank builds the same one.
        stages: number of stages J; units are balanced by operation count, or by `costs`.
        split: units per stage, instead of balancing.
        method: ``'petra'``; its ancestors ``'dsp'`` (inputs buffered) and ``'delayed'`` (graph and parameters kept);
            ``'local'``, where every stage learns from a loss of its own and no gradient travels down; or the exact
            controls ``'backprop'`` and ``'reversible'``, which have no delay.
        accumulation_steps: k, gradients averaged per update.
        optimizer: called with a stage's [(full name in the model, parameter), ...], gives its optimizer.
        scheduler: called with a stage's optimizer, gives its schedule (torch's, or timm's with `step_update`). All
            advance in the same tick, once for every k micro-batches fed.
        loss: (logits, labels) -> 0-d mean loss; labels may be soft.
        autocast: run units under autocast to this type, for example torch.bfloat16; streams stay float32.
        clip_grad: largest gradient norm, per stage.
        last_stage: ``'graph'`` keeps the last stage's graph within the tick (cost 3), ``'recompute'`` does not (4).
        seed: random numbers inside the model come from (seed, unit, micro-batch).
        input_size: (C, H, W) for balancing; default: the model's pretrained_cfg.
        profile: measured costs of the units, for balancing; see `petra_zoo.petra.measure`.
        device_speed: of each rank's device relative to each other, for balancing.
        world: this process among several; see `petra_zoo.petra.join`.
        wire: the type in which messages travel; they arrive in their own type.
        timeout: seconds that a message may take after the first tick.

    Raises:
        ValueError: a setting that does not fit the model, with what would.

    Example:
        >>> pipeline = Pipeline(model, stages=4, optimizer=lambda named: torch.optim.SGD([p for _, p in named], 0.1))
        >>> for images, labels in loader:
        ...     output = pipeline.step(images, labels)
        >>> pipeline.drain()
    """

    def __init__(
        self,
        model: Any,
        stages: int | None = None,
        *,
        split: Sequence[int] | None = None,
        method: Method = "petra",
        accumulation_steps: int = 1,
        optimizer: Callable[[NamedParameters], torch.optim.Optimizer] | None = None,
        scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
        loss: Loss = F.cross_entropy,
        autocast: torch.dtype | None = None,
        clip_grad: float | None = None,
        last_stage: Literal["graph", "recompute"] = "graph",
        seed: int = 0,
        input_size: tuple[int, int, int] | None = None,
        profile: Profile | None = None,
        device_speed: Sequence[float] | None = None,
        world: World | None = None,
        wire: Wire | None = None,
        timeout: float = 60.0,
    ) -> None:
        if method not in METHODS:
            raise ValueError(f"method is one of {', '.join(METHODS)}, not {method!r}")
        if accumulation_steps < 1:
            raise ValueError(f"accumulation_steps must be at least 1, not {accumulation_steps}")
        if last_stage not in ("graph", "recompute"):
            raise ValueError(f"last_stage is 'graph' or 'recompute', not {last_stage!r}")
        self.model, self.method = model, method
        self.world = world or World(device=next(model.parameters()).device)
        units = model.units()
        _require_all_parameters(model, units)
        trainable = (i for i, unit in enumerate(units) if any(p.requires_grad for p in unit.parameters()))
        first_trainable = next(trainable, len(units) - 1)
        self.settings = Settings(
            loss, accumulation_steps, seed, autocast, clip_grad, last_stage == "graph", first_trainable
        )

        @cache
        def costs() -> Costs:
            keeps_graph = last_stage == "graph" and method not in ("delayed", "local", "backprop")
            if profile is not None:
                return Costs(profile.costs(method), profile.costs(method, last_stage=last_stage == "graph"))
            return counted_costs(model, input_size, COST_WITHOUT_RECOMPUTATION / COST if keeps_graph else 1.0)

        speeds = list(device_speed) if device_speed is not None else None
        if speeds is not None and len(speeds) != self.world.size:
            raise ValueError(f"device_speed={speeds} must give one speed for each of {self.world.size} processes")
        of_stages = speeds if stages == self.world.size else None
        self.partition = partition(len(units), stages, split, costs, of_stages)
        self.owners = owners(self.partition, self.world.size, costs, speeds)
        self.costs, self.device_speed = costs, speeds
        if self.world.size > 1:
            mine = [i for j in self.owners[self.world.rank] for i in self.partition[j]]
            keep_only(units, mine, self.world.device)
        self._widths = output_widths(model, input_size) if method == "local" else []
        names = {id(p): name for name, p in model.named_parameters()}
        self.stages: list[Stage] = []  # those of this rank
        for j in self.owners[self.world.rank]:
            owned = self.partition[j]
            below = units[owned[0] - 1] if j > 0 else None
            stage = self._make_stage(
                units=[units[i] for i in owned],
                index=j,
                first_unit=owned[0],
                settings=self.settings,
                sends_streams=method in ("petra", "reversible") and below is not None and below.reversible,
                last=j == len(self.partition) - 1,
            )
            stage.across = self.world.across
            if isinstance(stage, LocalStage):
                names |= stage.auxiliary_names()
            own = [(names[id(p)], p) for group in stage.parameters for p in group]
            if own and optimizer is not None:
                stage.optimizer = optimizer(own)
                stage.scheduler = scheduler(stage.optimizer) if scheduler else None
            self.stages.append(stage)
        lowest = next(j for j, owned in enumerate(self.partition) if first_trainable in owned)
        self.clock = Clock(len(self.partition), method not in EXACT, backwards=method != "local", lowest=lowest)
        self.fed = 0
        self.wire, self.timeout = wire or Wire(), timeout
        self.links = self._make_links(self.wire)
        self._probe: Probe | None = None

    def _make_stage(self, **kwargs: Any) -> Stage:
        if self.method == "dsp":
            return BufferedStage(**kwargs)
        if self.method in ("delayed", "backprop"):
            return GraphStage(**kwargs, stash=self.method == "delayed")
        if self.method == "local":
            return LocalStage(**kwargs, widths=self._widths)
        return Stage(**kwargs)

    def _make_links(self, wire: Wire, tag: int = 0) -> Links:
        if self.world.size == 1:
            return Links(wire)
        running = tag == EVALUATION_TAG and self.fed > 0
        return ProcessLinks(wire, self.world, self.owners[self.world.rank], self.timeout, tag, running)

    # -- training -------------------------------------------------------------------------------------------------

    def step(self, images: Tensor | None = None, labels: Tensor | None = None) -> Output:
        """One tick: feeds a micro-batch and lets every stage work on what it received.

        Every rank calls it, the one that owns the stem with a micro-batch, the others without.

        Args:
            images: [B, C, H, W]; must not be overwritten while in flight.
            labels: [B] class indices, or [B, classes] probabilities.

        Returns:
            Loss and logits of the micro-batch that reached the head in this tick.

        Raises:
            NotFiniteError: a loss or a gradient is infinite or not a number; names the first stage that has one. On
                the CPU no such gradient has reached a parameter.
        """
        fed = None
        if self.world.first:
            if images is None or labels is None:
                raise ValueError("the rank that owns the stem feeds images and labels")
            # Replicas see different micro-batches: random numbers must differ as well.
            fed = Up(self.fed * self.world.replicas + self.world.replica, (images,), labels)
            if self._probe:
                self._probe.saw_batch(fed)
        self.fed += 1
        output = self._run_tick(fed, feeding=True)
        if self.fed % self.settings.accumulation_steps == 0:
            self._advance_schedules()
        return output

    def drain(self) -> list[Output]:
        """Runs the remaining 2 (J - 1) ticks without input, then updates from windows that are not full.

        Returns:
            What came out, in order.
        """
        outputs = []
        while self.in_flight:
            outputs.append(self._run_tick(None, feeding=False))
        for stage in reversed(self.stages):
            stage.update(partial=True)
            stage.finite.settle()
        return [output for output in outputs if output.micro_batch is not None]

    @property
    def tick(self) -> int:
        """Ticks run so far."""
        return self.clock.tick + 1

    def loads(self) -> list[float]:
        """Each rank's work per micro-batch relative to the busiest rank's, by the costs that balanced the stages."""
        of_stages = self.costs().of_stages(self.partition)
        speeds = self.device_speed or [1.0] * len(self.owners)
        seconds = [sum(of_stages[j] for j in owned) / s for owned, s in zip(self.owners, speeds, strict=True)]
        return [x / max(seconds) for x in seconds]

    def efficiency(self) -> float:
        """Predicted share of the devices' time that is spent computing: messages are hidden, ranks wait."""
        loads = self.loads()
        return sum(loads) / len(loads) if self.clock.delayed else 1.0 / len(loads)

    @property
    def in_flight(self) -> int:
        """Micro-batches fed whose backward has not ended."""
        return self.clock.in_flight

    def _run_tick(self, fed: Up | None, feeding: bool) -> Output:
        """Forward of a young micro-batch and backward of an older one in every stage, then the updates.

        Messages are received in the order of sending, so those of the previous tick come before this tick's.
        """
        clock, links, output = self.clock, self.links, Output()
        clock.next_tick(feeding)
        self._expect(clock.tick + 1 if clock.delayed else clock.tick)
        with self._own_generators():
            for stage in self.stages:  # forwards; the last stage goes backward at once
                if not clock.forward(stage.index):
                    continue
                up = fed if stage.index == 0 else links.receive_up(stage.index, stage.keeps_received)
                assert up is not None
                if stage.last:
                    down, loss, logits = stage.forward_backward(up)
                    output = Output(up.micro_batch, loss, logits, up.labels)
                    self._send_down(stage, down)
                else:
                    links.send_up(stage.index + 1, stage.forward(up))
            for stage in reversed(self.stages):  # backwards, with the parameters the forwards used
                if not stage.last and clock.backward(stage.index):
                    self._send_down(stage, stage.backward(links.receive_down(stage.index)))
            for stage in reversed(self.stages):  # what is not finite came down: the first to find it is where it began
                stage.update()
        return output

    def _expect(self, tick: int) -> None:
        """Tells the links which messages this rank will receive in a tick."""
        self.links.expect(
            tick,
            [stage.index for stage in self.stages if stage.index > 0 and self.clock.forward(stage.index, tick)],
            [stage.index for stage in self.stages if not stage.last and self.clock.backward(stage.index, tick)],
        )

    def _send_down(self, stage: Stage, down: Down) -> None:
        if stage.sends_gradients:
            self.links.send_down(stage.index - 1, down)

    def _advance_schedules(self) -> None:
        updates = self.fed // self.settings.accumulation_steps
        for stage in self.stages:
            if stage.scheduler is None:
                continue
            if hasattr(stage.scheduler, "step_update"):  # timm's
                stage.scheduler.step_update(updates)
            else:
                # A stage behind schedule has not stepped its optimizer yet: torch would warn about the order.
                optimizer: Any = stage.optimizer  # the attribute is private to torch
                optimizer._opt_called = True
                stage.scheduler.step()

    @contextmanager
    def _own_generators(self) -> Iterator[None]:
        """The stages seed the global generators; outside they are left as they were."""
        device = self.world.device
        with torch.random.fork_rng([device] if device.type == "cuda" else [], device_type="cuda"):
            yield

    # -- measuring and saving -------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, images: Tensor) -> Tensor:
        """Logits [B, classes] in eval mode; micro-batches in flight, statistics and modes stay as they are.

        Raises:
            RuntimeError: the stages are spread over processes.
        """
        self._require_one_process("evaluate()", "predict() runs through all of them")
        modes = [(m, m.training) for m in self.model.modules()]
        self.model.eval()
        try:
            with ExitStack() as stack:
                if self.settings.autocast is not None:
                    stack.enter_context(torch.autocast(images.device.type, dtype=self.settings.autocast))
                return self.model(images)
        finally:
            for m, training in modes:
                m.training = training

    @torch.no_grad()
    def predict(
        self, batches: Iterable[tuple[Tensor, Tensor]], count: int, model: Any = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Runs batches through the stages, forward only and in eval mode; what trains stays where it is.

        Every rank calls it and exhausts it. Modes are the caller's: call `eval()` on the model before, `train()` after.

        Args:
            batches: images [B, C, H, W] and labels [B], wanted from the rank that owns the stem; the first is the
                largest.
            count: how many batches there are.
            model: the model whose stages run (a moving average of this one's); default: the pipeline's own.

        Yields:
            Logits [B, classes] and labels, on the rank that owns the head.
        """
        links = self._make_links(Wire(), EVALUATION_TAG)  # nothing is rounded: the model is evaluated, not the wire
        units = (model or self.model).units()
        first, last = self.stages[0].index, self.stages[-1].index
        own = [units[i] for j in range(first, last + 1) for i in self.partition[j]]
        feed = iter(batches)
        links.expect(0, [first], [])
        for number in range(count):
            if number + 1 < count:
                links.expect(number + 1, [first], [])
            if self.world.first:
                images, labels = next(feed)
                up = Up(number, (images,), labels)
            else:
                up = links.receive_up(first)
            streams = up.streams
            with ExitStack() as stack:
                if self.settings.autocast is not None:
                    stack.enter_context(torch.autocast(self.world.device.type, dtype=self.settings.autocast))
                for unit in own:
                    streams = unit(*streams)
            if self.world.last:
                yield streams[0], up.labels
            else:
                links.send_up(last + 1, Up(number, streams, up.labels))
        links.finish()

    def whole_model(self, model: Any = None) -> Any:
        """The model, or a moving average of it, complete and on the CPU, on the rank that owns the head; else None.

        Every rank calls it.
        """
        model = model or self.model
        return whole_model(model, self.partition, self.owners, self.world, self.timeout)

    @contextmanager
    def probe(self, every: int = 1) -> Iterator[Probe]:
        """Measures, while the context lasts, how good each stage's gradients are; see `Probe`.

        Args:
            every: measure every so many micro-batches; one measurement costs a backpropagation per stage.

        Raises:
            RuntimeError: the stages are spread over processes.
        """
        self._require_one_process("probe()", "train with the same seed in one process to measure")
        probe = Probe(self.model.units(), self.stages, every)
        self._watch(probe)
        try:
            yield probe
        finally:
            self._watch(None)

    def _require_one_process(self, what: str, instead: str) -> None:
        if self.world.size > 1:
            raise RuntimeError(f"{what} is for a pipeline in one process; {instead}")

    def _watch(self, probe: Probe | None) -> None:
        self._probe = probe
        for stage in self.stages:
            stage.watcher = probe

    def state_dict(self) -> dict[str, Any]:
        """Everything a bit-exact continuation needs: model, optimizers, schedules, counters, messages, FIFOs.

        The tensors are the live ones: copy or save them before the next step.

        Raises:
            RuntimeError: the stages are spread over processes.
        """
        self._require_one_process("state_dict()", "whole_model() gathers the weights")
        return state_of(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave, the model included.

        Raises:
            ValueError: the state is of another method or partition.
            RuntimeError: the stages are spread over processes.
        """
        self._require_one_process("load_state_dict()", "load the model's weights before the pipeline is made")
        with self._own_generators():
            restore(self, state)


def _require_all_parameters(model: Any, units: Sequence[Unit]) -> None:
    """Raises ValueError for a parameter that no stage would train or update."""
    owned = {id(p) for unit in units for p in unit.parameters()}
    for name, p in model.named_parameters():
        if p.requires_grad and id(p) not in owned:
            raise ValueError(f"{name} belongs to no unit, so no stage would train it: model.units() must contain it")
