"""The pipeline: J stages, one clock.

In every tick each stage runs the forward of a young micro-batch and the backward of an older one (section 3 of arXiv
2406.02052). Micro-batch n is fed at tick n, reaches the head at tick n + J - 1 and stage i (from 0) goes backward
through it at tick n + 2 (J - 1) - i. Nothing sent in a tick is received in the same tick.

The exact controls `backprop` and `reversible` run the same stages without the clock: up and down within one tick.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from petra_zoo.petra.ancestors import BufferedStage, GraphStage
from petra_zoo.petra.messages import Down, Up
from petra_zoo.petra.partition import COST, COST_WITHOUT_RECOMPUTATION, partition
from petra_zoo.petra.probes import Probe
from petra_zoo.petra.stage import Loss, Settings, Stage

Method = Literal["petra", "dsp", "delayed", "backprop", "reversible"]
METHODS: tuple[Method, ...] = ("petra", "dsp", "delayed", "backprop", "reversible")
EXACT: tuple[Method, ...] = ("backprop", "reversible")
NamedParameters = list[tuple[str, nn.Parameter]]


@dataclass
class Output:
    """What a tick gives: the micro-batch that reached the head, or None everywhere while the pipeline fills."""

    micro_batch: int | None = None
    loss: Tensor | None = None
    logits: Tensor | None = None


class Pipeline:
    """Trains a model cut into stages, in one process.

    The model's own parameters and buffers are the live ones: they can be read, saved or evaluated at any time.

    Args:
        model: a model with `units()`, in train mode; every `petra_*` model has them.
        stages: number of stages J; units are balanced by operation count, or by `costs`.
        split: units per stage, instead of balancing.
        method: ``'petra'``; its ancestors ``'dsp'`` (inputs buffered) and ``'delayed'`` (graph and parameters kept);
            or the exact controls ``'backprop'`` and ``'reversible'``, which have no delay.
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
        costs: measured cost of each unit, for balancing.

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
        costs: Sequence[float] | None = None,
    ) -> None:
        if method not in METHODS:
            raise ValueError(f"method is one of {', '.join(METHODS)}, not {method!r}")
        if accumulation_steps < 1:
            raise ValueError(f"accumulation_steps must be at least 1, not {accumulation_steps}")
        if last_stage not in ("graph", "recompute"):
            raise ValueError(f"last_stage is 'graph' or 'recompute', not {last_stage!r}")
        self.model, self.method = model, method
        self.settings = Settings(loss, accumulation_steps, seed, autocast, clip_grad, last_stage == "graph")
        units = model.units()
        keeps_graph = last_stage == "graph" and method not in ("delayed", "backprop")
        discount = COST_WITHOUT_RECOMPUTATION / COST if keeps_graph else 1.0
        self.partition = partition(model, len(units), stages, split, input_size, costs, discount)
        names = {id(p): name for name, p in model.named_parameters()}
        self.stages: list[Stage] = []
        for j, owned in enumerate(self.partition):
            below = units[owned[0] - 1] if j > 0 else None
            stage = self._make_stage(
                units=[units[i] for i in owned],
                first_unit=owned[0],
                settings=self.settings,
                sends_streams=method in ("petra", "reversible") and below is not None and below.reversible,
                last=j == len(self.partition) - 1,
            )
            own = [(names[id(p)], p) for group in stage.parameters for p in group]
            if own and optimizer is not None:
                stage.optimizer = optimizer(own)
                stage.scheduler = scheduler(stage.optimizer) if scheduler else None
            self.stages.append(stage)
        self.tick = 0
        self.fed = 0
        self._ups: dict[int, Up] = {}  # what each stage receives in the coming tick
        self._downs: dict[int, Down] = {}
        self._probe: Probe | None = None

    def _make_stage(self, **kwargs: Any) -> Stage:
        if self.method == "dsp":
            return BufferedStage(**kwargs)
        if self.method in ("delayed", "backprop"):
            return GraphStage(**kwargs, stash=self.method == "delayed")
        return Stage(**kwargs)

    # -- training -------------------------------------------------------------------------------------------------

    def step(self, images: Tensor, labels: Tensor) -> Output:
        """One tick: feeds a micro-batch and lets every stage work on what it received.

        Args:
            images: [B, C, H, W]; must not be overwritten while in flight.
            labels: [B] class indices, or [B, classes] probabilities.

        Returns:
            Loss and logits of the micro-batch that reached the head in this tick.
        """
        fed = Up(self.fed, (images,), labels)
        self.fed += 1
        if self._probe:
            self._probe.saw_batch(fed)
        output = self._run_tick(fed)
        if self.fed % self.settings.accumulation_steps == 0:
            self._advance_schedules()
        return output

    def drain(self) -> list[Output]:
        """Runs the remaining 2 (J - 1) ticks without input, then updates from windows that are not full.

        Returns:
            What came out, in order.
        """
        outputs = []
        while self._ups or self._downs:
            outputs.append(self._run_tick(None))
        for stage in self.stages:
            stage.update(partial=True)
        return [output for output in outputs if output.micro_batch is not None]

    @property
    def in_flight(self) -> int:
        """Micro-batches fed whose backward has not ended."""
        flying = {up.micro_batch for up in self._ups.values()} | {down.micro_batch for down in self._downs.values()}
        return self.fed - min(flying) if flying else 0

    def _run_tick(self, fed: Up | None) -> Output:
        with self._own_generators():
            output = self._exact_tick(fed) if self.method in EXACT else self._pipelined_tick(fed)
            for stage in self.stages:
                stage.update()
        self.tick += 1
        return output

    def _pipelined_tick(self, fed: Up | None) -> Output:
        ups, downs = self._ups, self._downs  # sent in the previous tick
        self._ups, self._downs = {}, {}
        if fed is not None:
            ups[0] = fed
        output = Output()
        for j, stage in enumerate(self.stages):  # forwards; the last stage goes backward at once
            if (up := ups.get(j)) is None:
                continue
            if stage.last:
                down, loss, logits = stage.forward_backward(up)
                output = Output(up.micro_batch, loss, logits)
                self._send_down(j, down)
            else:
                self._ups[j + 1] = stage.forward(up)
        for j, stage in enumerate(self.stages):  # backwards, with the parameters the forwards used
            if (received := downs.get(j)) is not None:
                self._send_down(j, stage.backward(received))
        return output

    def _exact_tick(self, fed: Up | None) -> Output:
        if fed is None:
            return Output()
        up = fed
        for stage in self.stages[:-1]:
            up = stage.forward(up)
        down, loss, logits = self.stages[-1].forward_backward(up)
        for stage in reversed(self.stages[:-1]):
            down = stage.backward(down)
        return Output(up.micro_batch, loss, logits)

    def _send_down(self, j: int, down: Down) -> None:
        if j > 0:  # nobody wants the gradient of the images
            self._downs[j - 1] = down

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
        device = next(self.model.parameters()).device
        with torch.random.fork_rng([device] if device.type == "cuda" else [], device_type="cuda"):
            yield

    # -- measuring and saving -------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, images: Tensor) -> Tensor:
        """Logits [B, classes] in eval mode; micro-batches in flight, statistics and modes stay as they are."""
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

    @contextmanager
    def probe(self, every: int = 1) -> Iterator[Probe]:
        """Measures, while the context lasts, how good each stage's gradients are; see `Probe`.

        Args:
            every: measure every so many micro-batches; one measurement costs a backpropagation per stage.
        """
        probe = Probe(self.model.units(), self.stages, every)
        self._watch(probe)
        try:
            yield probe
        finally:
            self._watch(None)

    def _watch(self, probe: Probe | None) -> None:
        self._probe = probe
        for stage in self.stages:
            stage.watcher = probe

    def state_dict(self) -> dict[str, Any]:
        """Everything a bit-exact continuation needs: model, optimizers, schedules, counters, messages, FIFOs.

        The tensors are the live ones: copy or save them before the next step.
        """
        return {
            "method": self.method,
            "partition": [len(owned) for owned in self.partition],
            "tick": self.tick,
            "fed": self.fed,
            "model": self.model.state_dict(),
            "ups": {j: (m.micro_batch, m.streams, m.labels) for j, m in self._ups.items()},
            "downs": {j: (m.micro_batch, m.streams, m.gradients) for j, m in self._downs.items()},
            "stages": [stage.state_dict() for stage in self.stages],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave, the model included.

        Raises:
            ValueError: the state is of another method or partition.
        """
        for key, mine in (("method", self.method), ("partition", [len(owned) for owned in self.partition])):
            if state[key] != mine:
                raise ValueError(f"the state is of a pipeline with {key}={state[key]}, this one has {key}={mine}")
        self.tick, self.fed = state["tick"], state["fed"]
        self.model.load_state_dict(state["model"])
        self._ups = {j: Up(n, _copies(x), y.clone()) for j, (n, x, y) in state["ups"].items()}
        self._downs = {j: Down(n, _copies(x), _copies(d)) for j, (n, x, d) in state["downs"].items()}
        with self._own_generators():
            for stage, stage_state in zip(self.stages, state["stages"], strict=True):
                stage.load_state_dict(stage_state)


def _copies(tensors: Any) -> Any:
    return tuple(None if x is None else x.clone() for x in tensors)
