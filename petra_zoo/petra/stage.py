"""One stage of PETRA: Algorithm 1 of arXiv 2406.02052, from the worker's perspective.

A stage holds one version of its parameters. Within a tick its forward and its backward both use the parameters from
before the tick's update. Nothing is kept in reversible units but the residues of those that have any (see `Unit`); a
unit without an inverse keeps a FIFO of its inputs.

In comments x is a micro-batch's streams, x~ the same streams reconstructed, delta the gradient of its loss with respect
to them; j is this stage, theta_j its parameters. Streams have any shape whose first dimension is the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from petra_zoo.petra.cast_weights import CastWeights, precision
from petra_zoo.petra.fifo import Fifo, filled
from petra_zoo.petra.finite import StreamRanges
from petra_zoo.petra.gate import gate_for, holding_back
from petra_zoo.petra.generator import seed_generators
from petra_zoo.petra.loss_scale import scale_for
from petra_zoo.petra.messages import Down, Up
from petra_zoo.petra.optimization import CountSchedule, LearningRateSchedule, State, load_optimizer, optimizer_state
from petra_zoo.petra.part import Part, StageSettings
from petra_zoo.petra.rates import Rates, rates_of
from petra_zoo.petra.stage_state import StageState, copies
from petra_zoo.petra.weight_prediction import Prediction
from petra_zoo.petra.window import Window
from petra_zoo.reversible import Gradients, Lent, Residue, Reversal, Streams, gradients_of


class Watcher(Protocol):
    """What a probe sees of a stage; see `petra_zoo.petra.probes`."""

    def saw_forward(self, stage: Stage, up: Up) -> None: ...

    def saw_backward(self, stage: Stage, micro_batch: int, inputs: Streams, gradients: dict[int, Tensor]) -> None: ...


class Stage:
    """Consecutive units, the optimizer of their parameters and what is in flight between forward and backward.

    Args:
        part: the units, and their place in the network.
        settings: shared by all stages.

    Attributes:
        capturable: whether CUDA graphs may replay its ticks: what lives from tick to tick is in FIFOs of `make_fifo`.
            Each class says it for itself.
    """

    capturable: ClassVar[bool] = True

    def __init__(self, part: Part, settings: StageSettings) -> None:
        self.units, self.settings = list(part.units), settings
        self.index, self.first_unit, self.last = part.index, part.first_unit, part.last
        self.goes_backward = self.first_unit + len(self.units) > settings.first_trainable
        self.sends_gradients = self.first_unit > settings.first_trainable
        self.sends_streams = part.sends_streams and self.sends_gradients
        self.parameters = [[p for p in unit.parameters() if p.requires_grad] for unit in self.units]
        self.casts = CastWeights(self.units, settings.autocast)
        self.optimizer: torch.optim.Optimizer | None = None
        self.scheduler: LearningRateSchedule | None = None
        self.rates: Rates | None = None  # where updates can be captured
        # In flight, by unit: inputs of units without an inverse, in the order of their forwards, 2 (J - 1 - j) of
        # them between two ticks; residues of reversible units that have any, by micro-batch.
        self.make_fifo = part.fifo
        self.fifos: list[Fifo] = [self.make_fifo() for _ in self.units]
        self.residues: list[dict[int, Residue]] = [{} for _ in self.units]
        self.window, self.gradients_in_window, self.updates = Window(), 0, 0
        self.prediction: Prediction | None = None
        self.watcher: Watcher | None = None
        self.finite = settings.finite
        self.ranges = StreamRanges(self.units, self.finite)
        self.gate, self.scale = gate_for(self.units, settings), scale_for(settings.autocast)
        self.last_backward = 0  # its micro-batch

    # -- one tick: forward of a young micro-batch, backward of an old one, update ---------------------------------

    def forward(self, up: Up) -> Up:
        """x_j = F_j(x_{j-1}, theta_j) for a young micro-batch (Eq. 5)."""
        if self.watcher:
            self.watcher.saw_forward(self, up)
        streams, device = up.streams, up.streams[0].device
        # PETRA keeps no graph: the backward, 2 (J - 1 - j) ticks from now, builds a new one.
        with torch.no_grad(), self.predicted_weights(), self.precision(device):
            for i, unit in enumerate(self.units):
                if self._keeps_input(i):
                    self.fifos[i].append(streams)  # x_{j-1}; line 8 of Alg. 1 prints x_j, which would be of no use
                with self.surroundings(i, up.micro_batch, device):
                    streams, residue = unit.evaluate(*streams)
                if residue and self._reconstructs(i):
                    self.residues[i][up.micro_batch] = residue
        return Up(up.micro_batch, streams, up.labels)

    def backward(self, down: Down) -> Down:
        """x~_{j-1} = F_j^{-1}(x~_j, theta_j) and the vector-Jacobian product there, for an older micro-batch (Eq. 5).

        With the *current* parameters, which have been updated since the micro-batch's forward: F_j^{-1} inverts today's
        F_j, not the one that made x_j. This is PETRA's approximation, and why no older parameters are kept. The
        update of this tick must not come first: forward and backward of a tick share theta_j.
        """
        return self._reverse(down.micro_batch, down.streams, self.scale.enlarged(down.gradients))

    def _reverse(self, micro_batch: int, streams: Streams, gradients: Gradients) -> Down:
        """The same from x~_j and delta_{j+1} on."""
        device, found = next(g.device for g in gradients if g is not None), dict[int, Tensor]()
        lent = Lent([*streams, *gradients])  # in one process a message is the sender's too
        with self.precision(device):
            for i in reversed(range(self._lowest(), len(self.units))):
                # FIFO: micro-batches come back in the order in which they went up.
                kept = self.fifos[i].popleft() if self._keeps_input(i) else None
                owned = lent.none_of([*streams, *gradients])
                lent.lend(kept or ())
                residue = self.residues[i].pop(micro_batch, ())
                with self.surroundings(i, micro_batch, device):
                    reversal = self._backward_unit(i, kept, streams, gradients, residue, owned)
                # What was kept is exact: it re-anchors the reconstruction of everything below.
                streams, gradients = kept or reversal.inputs, reversal.input_gradients
                _collect(found, self._wanted_of(i)[0], reversal.parameter_gradients)
        inputs = streams if self._lowest() == 0 else ()
        return self._finish_backward(micro_batch, inputs, gradients, found)

    def forward_backward(self, up: Up) -> tuple[Down, Tensor, Tensor]:
        """The last stage, which has no delay: forward, loss and backward of one micro-batch in one tick.

        Returns:
            The message down, the loss (0-d) and the logits.
        """
        if not self.settings.last_keeps_graph:  # cost 4: as every other stage, without a tick in between
            logits = self.forward(up).streams[0]
            loss, d_logits = self._loss(logits, up)
            return self._reverse(up.micro_batch, (logits,), (d_logits,)), loss, logits
        if self.watcher:
            self.watcher.saw_forward(self, up)
        inputs = leaves(up.streams, needs_gradient=self.sends_gradients)
        with torch.enable_grad():  # cost 3: the graph is used in the tick in which it is built
            logits = self.run_units(inputs, up.micro_batch)[0]
        loss, d_logits = self._loss(logits.detach(), up)
        gradients, found = self._vector_jacobian((logits,), (d_logits,), inputs)
        return self._finish_backward(up.micro_batch, up.streams, gradients, found), loss, logits.detach()

    def update(self, partial: bool = False) -> bool:
        """theta_j = Optimizer_j(theta_j, mean of the window's gradients), once the window is full (Eq. 5).

        The window counts this stage's own backwards, so windows hold the same micro-batches in every stage, though each
        closes its own in another tick.

        Args:
            partial: update with the gradients there are.

        Returns:
            Whether it has, as far as the host knows.

        Raises:
            NotFiniteError: a gradient is not finite; see `FiniteCheck` for who raises it when. No such is applied.
        """
        count = self.gradients_in_window
        if count == 0 or (count < self.settings.optimization.accumulation_steps and not partial):
            return False
        self.gradients_in_window = 0
        self.finite.see_ranges(self.ranges, f"stage {self.index}")
        if self.optimizer is None:
            return True
        gradients = self._sums()
        # Looked at before clipping, which would spread one infinite value over all gradients as nan.
        what = f"the gradient of stage {self.index}'s parameters"
        number = self.gate.average(gradients, count, what, self.last_backward)
        if number is None:
            self.optimizer.zero_grad(set_to_none=True)
            return False
        if self.settings.optimization.clip_grad is not None:
            clip_grad_norm_(self.own_parameters(), self.settings.optimization.clip_grad)
        with holding_back(self.optimizer, gradients, number) if self.finite.waits(number.device) else nullcontext():
            self._step(self.optimizer)
        return True

    # -- parts ----------------------------------------------------------------------------------------------------

    def own_parameters(self) -> list[nn.Parameter]:
        """What the stage trains, each parameter once."""
        return list({id(p): p for group in self.parameters for p in group}.values())

    def _sums(self) -> list[Tensor]:
        return [p.grad for p in self.own_parameters() if p.grad is not None]

    def start_optimizer(self, names: Mapping[int, str]) -> None:
        """Makes optimizer and schedule, where there is something to train.

        Args:
            names: of the model's parameters, by id.
        """
        own = [(names[id(p)], p) for p in self.own_parameters()]
        optimization = self.settings.optimization
        if own and optimization.optimizer is not None:
            self.optimizer = optimization.optimizer(own)
            device = own[0][1].device
            if self.settings.static or device.type == "cuda":
                # What is predicted may go by numbers that a prepared optimizer keeps on the device: as it was made.
                self.rates = rates_of(self.optimizer, device, prepare=optimization.weight_prediction == "none")
            self.scheduler = optimization.schedule_of(self.optimizer)

    def advance_schedule(self, updates: int) -> None:
        """Sets the learning rate for a number of updates so far, in whatever tick the stage's own come."""
        if self.scheduler is None:
            return
        if isinstance(self.scheduler, CountSchedule):
            self.scheduler.step_update(updates)
        else:
            # A stage behind schedule has not stepped its optimizer yet: torch would warn about the order. Its own mark
            # is private.
            vars(self.optimizer)["_opt_called"] = True
            self.scheduler.step()

    def predicted_weights(self) -> AbstractContextManager[None]:
        """Inside, the weights that a forward uses: today's, unless they are predicted."""
        return self.prediction.ahead(self.gradients_in_window) if self.prediction else nullcontext()

    def run_units(self, streams: Streams, micro_batch: int, *, own_weights: bool = False) -> Streams:
        """Runs the units for a micro-batch.

        Args:
            streams: what comes in.
            micro_batch: whose they are.
            own_weights: autocast casts them; with a graph, which the caller decides, gradients arrive at the parameters
                and not at copies of them.
        """
        device = streams[0].device
        with self.precision(device):
            for i, unit in enumerate(self.units):
                with self.surroundings(i, micro_batch, device, own_weights):
                    streams = unit(*streams)
        return streams

    @contextmanager
    def precision(self, device: torch.device) -> Iterator[None]:
        """Inside, units compute in autocast's type, with weights cast to it already, and streams note their ranges."""
        # Without an optimizer here somebody else updates: through `weight.data`, perhaps, which nobody counts.
        counted = self.settings.optimization.optimizer is not None
        self.casts.refresh(self.updates, lasting=counted and self.prediction is None)
        with self.ranges.noted(device), precision(device, self.settings.autocast):
            yield

    def surroundings(
        self, i: int, micro_batch: int, device: torch.device, own_weights: bool = False
    ) -> AbstractContextManager[None]:
        """What every evaluation of unit i for a micro-batch shares: random numbers and weights; see `run_units`."""
        seed_generators(self.settings.seed, self.first_unit + i, micro_batch, device)
        return nullcontext() if own_weights else self.casts.standing_in(i)

    def _step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.prediction:
            self.prediction.coasting.before_step()
        # For optimizers that draw (PSGD): the same numbers in whichever process the stage is, and whatever it did last.
        seed_generators(self.settings.seed, -1 - self.index, self.updates, self.own_parameters()[0].device)
        with self.rates.on_device() if self.rates else nullcontext():
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self.updates += 1

    def _lowest(self) -> int:
        """The first unit that goes backward."""
        return max(0, self.settings.first_trainable - self.first_unit)

    @property
    def kept(self) -> Sequence[Fifo]:
        """Where it keeps what a backward will need."""
        return self.fifos

    @property
    def keeps_received(self) -> bool:
        """Whether a message up is looked at again in a later tick: a block hands one of its streams on as it is."""
        return not self.last and any(map(self._keeps_input, range(len(self.units))))

    def _keeps_input(self, i: int) -> bool:
        return i >= self._lowest() and (not self.units[i].reversible or self.units[i].anchor)

    def _reconstructs(self, i: int) -> bool:
        return i >= self._lowest() and self.units[i].reversible

    def _backward_unit(
        self, i: int, kept: Streams | None, streams: Streams, gradients: Gradients, residue: Residue, owned: bool
    ) -> Reversal:
        unit, (_, parameters) = self.units[i], self._wanted_of(i)
        if unit.reversible:
            return unit.reverse(streams, gradients, parameters, residue, owned=owned)
        assert kept is not None
        needs_input_gradient = self.first_unit + i > self.settings.first_trainable
        return unit.recompute(kept, gradients, parameters, needs_input_gradient, owned=owned)

    def _wanted_of(self, i: int) -> tuple[list[nn.Parameter], list[Tensor]]:
        """The parameters of unit i, and the tensors at which their gradients are found; one may have two."""
        weights, copies = self.casts.stand_ins(i)
        own = [p for p in self.parameters[i] if p.requires_grad]  # but for those that were frozen since
        return [*own, *weights], [*own, *copies]

    def _vector_jacobian(
        self, outputs: Streams, gradients: Gradients, inputs: Streams, parameters: list[Tensor] | None = None
    ) -> tuple[Gradients, dict[int, Tensor]]:
        """Gradients of the inputs, and of the parameters by id; `parameters` replaces the stage's own."""
        own = [p for p in self.own_parameters() if parameters is not None or p.requires_grad]
        at = list(own if parameters is None else parameters)
        if parameters is None:
            for i in range(len(self.units)):
                weights, copies = self.casts.stand_ins(i)
                own, at = own + weights, at + copies
        wanted = [x for x in inputs if x.requires_grad]
        found = gradients_of(outputs, gradients, [*wanted, *at])
        of_inputs = iter(found[: len(wanted)])
        by_parameter: dict[int, Tensor] = {}
        _collect(by_parameter, own, found[len(wanted) :])
        return tuple(next(of_inputs) if x.requires_grad else None for x in inputs), by_parameter

    def _loss(self, logits: Tensor, up: Up) -> tuple[Tensor, Tensor]:
        """The mean loss of a micro-batch, 0-d, and its gradient with respect to the logits [B, classes]."""
        logits = logits.detach().requires_grad_()
        with torch.enable_grad():
            loss = self.settings.loss(logits if logits.dtype == torch.float64 else logits.float(), up.labels)
        self.gate.saw_loss(loss, f"the loss of stage {self.index}", up.micro_batch)
        return loss.detach(), torch.autograd.grad(self.scale.of_loss(loss), logits)[0]

    def _finish_backward(
        self, micro_batch: int, inputs: Streams, gradients: Gradients, found: dict[int, Tensor]
    ) -> Down:
        """Adds a micro-batch's parameter gradients to the window and addresses the message down, (x~_{j-1}, delta_j).

        Line 24 of Alg. 1 prints x_j; what the stage below reconstructs from is its own output, x~_{j-1}.
        """
        found, gradients = self.scale.restored(found, gradients)
        if self.watcher:
            self.watcher.saw_backward(self, micro_batch, inputs, found)
        found, gradients = self.gate.let_in(found, gradients)
        self.window.add(self.own_parameters(), found)
        self.gradients_in_window += 1
        self.last_backward = micro_batch
        full = self.gradients_in_window == self.settings.optimization.accumulation_steps
        if (
            full and self.optimizer and not self.settings.static
        ):  # in a captured tick there would be nothing to wait for
            self.gate.begin_average(self._sums(), self.gradients_in_window)
        return Down(micro_batch, inputs if self.sends_streams else (), gradients if self.sends_gradients else ())

    # -- state ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> StageState:
        """Optimizer, schedule, accumulated gradients and everything in flight inside the stage."""
        return {
            "optimizer": optimizer_state(self.optimizer) if self.optimizer else None,
            "scheduler": self.scheduler.state_dict() if self.scheduler else None,
            "gradients": [p.grad for p in self.own_parameters()],
            "gradients_in_window": self.gradients_in_window,
            "in_flight": self.in_flight_state(),
            "updates": self.updates,
            "prediction": self.prediction.coasting.state_dict() if self.prediction else None,
            "gate": self.gate.state_dict(),
            "scale": self.scale.state_dict(),
        }

    def load_state_dict(self, state: StageState) -> None:
        """Restores what `state_dict` gave; the model's own parameters must have been restored before."""
        if self.optimizer and state["optimizer"] is not None:
            load_optimizer(self.optimizer, state["optimizer"])
        if self.scheduler and state["scheduler"] is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        for p, gradient in zip(self.own_parameters(), state["gradients"], strict=True):
            self.window.restore(p, gradient)
        self.gradients_in_window = state["gradients_in_window"]
        self.updates = state.get("updates", 0)
        if self.prediction:
            self.prediction.coasting.load_state_dict(state.get("prediction"))
        self.gate.load_state_dict(state.get("gate"), self.gradients_in_window)
        self.scale.load_state_dict(state.get("scale"))
        self.load_in_flight_state(state["in_flight"])

    def in_flight_state(self) -> State:
        """What the stage keeps between the forward and the backward of a micro-batch, by unit."""
        return {"inputs": [list(fifo) for fifo in self.fifos], "residues": [dict(kept) for kept in self.residues]}

    def load_in_flight_state(self, state: State) -> None:
        """Restores what `in_flight_state` gave."""
        self.fifos = [filled(self.make_fifo, entries) for entries in state["inputs"]]
        self.residues = [{n: copies(residue) for n, residue in kept.items()} for kept in state["residues"]]


def leaves(streams: Streams, needs_gradient: bool) -> Streams:
    """Copies of the streams that start a graph."""
    return tuple(x.detach().requires_grad_(needs_gradient) for x in streams)


def _collect(found: dict[int, Tensor], parameters: Sequence[nn.Parameter], gradients: Gradients) -> None:
    """Adds gradients to those found so far: a parameter may stand in several units of a stage."""
    for p, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None and p.requires_grad:
            found[id(p)] = found[id(p)].to(p.dtype) + gradient.to(p.dtype) if id(p) in found else gradient
