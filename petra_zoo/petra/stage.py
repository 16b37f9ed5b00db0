"""One stage of PETRA: Algorithm 1 of arXiv 2406.02052, from the worker's perspective.

A stage holds one version of its parameters. Within a tick its forward and its backward both use the parameters from
before the tick's update. Nothing is kept in reversible units; a unit without an inverse keeps a FIFO of its inputs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from petra_zoo.petra.finite import FiniteCheck, pooled
from petra_zoo.petra.generator import seed_generators
from petra_zoo.petra.messages import Down, Up
from petra_zoo.reversible import CoupledUnit, Reversal, Streams, Unit
from petra_zoo.reversible.unit import Gradients, gradients_of

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Settings:
    """What all stages of a pipeline share.

    Attributes:
        first_trainable: index of the first unit with a parameter to train; nobody wants gradients below it.
    """

    loss: Loss
    accumulation_steps: int = 1
    seed: int = 0
    autocast: torch.dtype | None = None
    clip_grad: float | None = None
    last_stage_keeps_graph: bool = True
    first_trainable: int = 0


class Watcher(Protocol):
    """What a probe sees of a stage; see `petra_zoo.petra.probes`."""

    def saw_forward(self, stage: Stage, up: Up) -> None: ...

    def saw_backward(self, stage: Stage, micro_batch: int, inputs: Streams, gradients: dict[int, Tensor]) -> None: ...


class Stage:
    """Consecutive units, the optimizer of their parameters and what is in flight between forward and backward.

    Args:
        units: the stage's units.
        index: which stage of the pipeline this is, from 0.
        first_unit: index of the first unit in the model.
        settings: shared by all stages.
        sends_streams: whether the stage below reconstructs, that is, wants to be sent its output back.
        last: whether this is the last stage, which has no delay.
    """

    def __init__(
        self, units: Sequence[Unit], index: int, first_unit: int, settings: Settings, sends_streams: bool, last: bool
    ) -> None:
        self.units = list(units)
        self.index = index
        self.first_unit = first_unit
        self.settings = settings
        self.goes_backward = first_unit + len(self.units) > settings.first_trainable
        self.sends_gradients = first_unit > settings.first_trainable
        self.sends_streams = sends_streams and self.sends_gradients
        self.last = last
        self.parameters = [[p for p in unit.parameters() if p.requires_grad] for unit in units]
        self.optimizer: torch.optim.Optimizer | None = None
        self.scheduler: Any = None
        self.fifos: list[deque[Streams]] = [deque() for _ in units]
        self.gradients_in_window = 0
        self.watcher: Watcher | None = None
        self.finite = FiniteCheck()
        self.across: Any = None  # process group of this stage in every replica of the pipeline

    # -- one tick: forward of a young micro-batch, backward of an old one, update ---------------------------------

    def forward(self, up: Up) -> Up:
        """x_j = F_j(x_{j-1}, theta_j) for a young micro-batch."""
        if self.watcher:
            self.watcher.saw_forward(self, up)
        streams = up.streams
        with torch.no_grad():
            for i, unit in enumerate(self.units):
                if self._keeps_input(i):
                    self.fifos[i].append(streams)
                with self.surroundings(i, up.micro_batch, streams[0].device):
                    streams = unit(*streams)
        return Up(up.micro_batch, streams, up.labels)

    def backward(self, down: Down) -> Down:
        """Reconstruction and vector-Jacobian product of an older micro-batch, with the *current* parameters."""
        streams, gradients = down.streams, down.gradients
        found: dict[int, Tensor] = {}
        for i in reversed(range(self._lowest(), len(self.units))):
            unit = self.units[i]
            kept = self.fifos[i].popleft() if self._keeps_input(i) else None  # exact: re-anchors what is below
            with self.surroundings(i, down.micro_batch, _device(gradients)):
                reversal = self._backward_unit(unit, kept, streams, gradients, i)
            streams, gradients = kept or reversal.inputs, reversal.input_gradients
            _collect(found, self.parameters[i], reversal.parameter_gradients)
        inputs = streams if self._lowest() == 0 else ()
        return self._finish_backward(down.micro_batch, inputs, gradients, found)

    def forward_backward(self, up: Up) -> tuple[Down, Tensor, Tensor]:
        """The last stage, which has no delay: forward, loss and backward of one micro-batch in one tick.

        Returns:
            The message down, the loss (0-d) and the logits.
        """
        if not self.settings.last_stage_keeps_graph:
            logits = self.forward(up).streams[0]
            loss, d_logits = self._loss(logits, up.labels)
            return self.backward(Down(up.micro_batch, (logits,), (d_logits,))), loss, logits
        if self.watcher:
            self.watcher.saw_forward(self, up)
        inputs = leaves(up.streams, needs_gradient=self.sends_gradients)
        with torch.enable_grad():
            logits = self.evaluate(inputs, up.micro_batch)[0]
        loss, d_logits = self._loss(logits.detach(), up.labels)
        gradients, found = self._vector_jacobian((logits,), (d_logits,), inputs)
        return self._finish_backward(up.micro_batch, up.streams, gradients, found), loss, logits.detach()

    def update(self, partial: bool = False) -> bool:
        """theta_j = Optimizer_j(theta_j, mean of the window's gradients), once the window is full.

        Args:
            partial: update with the gradients there are.

        Raises:
            NotFiniteError: a gradient is not finite; on the CPU the parameters are as before.
        """
        count = self.gradients_in_window
        if count == 0 or (count < self.settings.accumulation_steps and not partial):
            return False
        self.gradients_in_window = 0
        if self.optimizer is None:
            return True
        flat = [p for group in self.parameters for p in group if p.grad is not None]
        if count > 1:
            torch._foreach_div_([p.grad for p in flat if p.grad is not None], float(count))
        if self.across is not None:
            _average([p.grad for p in flat if p.grad is not None], self.across)
        self.finite.see(
            pooled([p.grad for p in flat if p.grad is not None]), f"the gradient of stage {self.index}'s parameters"
        )
        if self.settings.clip_grad is not None:
            clip_grad_norm_(flat, self.settings.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return True

    # -- parts ----------------------------------------------------------------------------------------------------

    def evaluate(self, streams: Streams, micro_batch: int) -> Streams:
        """Runs the units for a micro-batch; the caller says whether with a graph."""
        for i, unit in enumerate(self.units):
            with self.surroundings(i, micro_batch, streams[0].device):
                streams = unit(*streams)
        return streams

    @contextmanager
    def surroundings(self, i: int, micro_batch: int, device: torch.device) -> Iterator[None]:
        """What every evaluation of unit i for a micro-batch shares: random numbers and autocast."""
        seed_generators(self.settings.seed, self.first_unit + i, micro_batch, device)
        with ExitStack() as stack:
            if self.settings.autocast is not None:
                stack.enter_context(torch.autocast(device.type, dtype=self.settings.autocast))
            yield

    def _lowest(self) -> int:
        """The first unit that goes backward."""
        return max(0, self.settings.first_trainable - self.first_unit)

    @property
    def keeps_received(self) -> bool:
        """Whether a message up is looked at again in a later tick: a block hands one of its streams on as it is."""
        return not self.last and any(map(self._keeps_input, range(len(self.units))))

    def _keeps_input(self, i: int) -> bool:
        return i >= self._lowest() and (not self.units[i].reversible or self.units[i].anchor)

    def _backward_unit(
        self, unit: Unit, kept: Streams | None, streams: Streams, gradients: Gradients, i: int
    ) -> Reversal:
        if unit.reversible:
            assert isinstance(unit, CoupledUnit)
            return unit.reverse(streams, gradients, self.parameters[i])
        assert kept is not None
        return unit.recompute(kept, gradients, self.parameters[i], self.first_unit + i > self.settings.first_trainable)

    def _vector_jacobian(
        self, outputs: Streams, gradients: Gradients, inputs: Streams, parameters: list[Tensor] | None = None
    ) -> tuple[Gradients, dict[int, Tensor]]:
        """Gradients of the inputs, and of the parameters by id; `parameters` replaces the stage's own."""
        own = [p for group in self.parameters for p in group]
        wanted = [x for x in inputs if x.requires_grad]
        found = gradients_of(outputs, gradients, [*wanted, *(own if parameters is None else parameters)])
        of_inputs = iter(found[: len(wanted)])
        by_parameter: dict[int, Tensor] = {}
        _collect(by_parameter, own, found[len(wanted) :])
        return tuple(next(of_inputs) if x.requires_grad else None for x in inputs), by_parameter

    def _loss(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = logits.detach().requires_grad_()
        with torch.enable_grad():
            loss = self.settings.loss(logits if logits.dtype == torch.float64 else logits.float(), labels)
        self.finite.see(loss, f"the loss of stage {self.index}")
        return loss.detach(), torch.autograd.grad(loss, logits)[0]

    def _finish_backward(
        self, micro_batch: int, inputs: Streams, gradients: Gradients, found: dict[int, Tensor]
    ) -> Down:
        """Adds a micro-batch's parameter gradients to the window and addresses the message down."""
        if self.watcher:
            self.watcher.saw_backward(self, micro_batch, inputs, found)
        for p in (p for group in self.parameters for p in group):
            gradient = found.get(id(p))
            if gradient is not None:
                p.grad = gradient if p.grad is None else p.grad.add_(gradient)
        self.gradients_in_window += 1
        return Down(micro_batch, inputs if self.sends_streams else (), gradients if self.sends_gradients else ())

    # -- state ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Optimizer, schedule, accumulated gradients and everything in flight inside the stage."""
        return {
            "optimizer": self.optimizer.state_dict() if self.optimizer else None,
            "scheduler": self.scheduler.state_dict() if self.scheduler else None,
            "gradients": [p.grad for group in self.parameters for p in group],
            "gradients_in_window": self.gradients_in_window,
            "in_flight": self.in_flight_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave; the model's own parameters must have been restored before."""
        if self.optimizer:
            self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler:
            self.scheduler.load_state_dict(state["scheduler"])
        flat = [p for group in self.parameters for p in group]
        for p, gradient in zip(flat, state["gradients"], strict=True):
            p.grad = None if gradient is None else gradient.clone()
        self.gradients_in_window = state["gradients_in_window"]
        self.load_in_flight_state(state["in_flight"])

    def in_flight_state(self) -> Any:
        """What the stage keeps between the forward and the backward of a micro-batch."""
        return [list(fifo) for fifo in self.fifos]

    def load_in_flight_state(self, state: Any) -> None:
        """Restores what `in_flight_state` gave."""
        self.fifos = [deque(tuple(x.clone() for x in streams) for streams in fifo) for fifo in state]


def leaves(streams: Streams, needs_gradient: bool) -> Streams:
    """Copies of the streams that start a graph."""
    return tuple(x.detach().requires_grad_(needs_gradient) for x in streams)


def _average(gradients: list[Tensor], group: Any) -> None:
    """Averages gradients over the replicas of a stage, in one message."""
    if gradients:
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat, group=group)
        flat /= dist.get_world_size(group)
        for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))


def _collect(found: dict[int, Tensor], parameters: list[nn.Parameter], gradients: Gradients) -> None:
    for p, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None:
            found[id(p)] = found[id(p)] + gradient if id(p) in found else gradient


def _device(gradients: Gradients) -> torch.device:
    return next(g.device for g in gradients if g is not None)
