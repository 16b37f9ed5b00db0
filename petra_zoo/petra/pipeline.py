"""The pipeline: J stages, one clock.

In every tick each stage runs the forward of a young micro-batch and the backward of an older one (section 3 of arXiv
2406.02052). Micro-batch n is fed at tick n, reaches the head at tick n + J - 1 and stage i (from 0) goes backward
through it at tick n + 2 (J - 1) - i. Nothing sent in a tick is received in the same tick. Three stages, F forward and
B backward of micro-batches 0, 1, 2, ...:

    tick      0     1     2      3      4      5
    stage 0   F0    F1    F2     F3     F4 B0  F5 B1
    stage 1         F0    F1     F2 B0  F3 B1  F4 B2
    stage 2               F0 B0  F1 B1  F2 B2  F3 B3

The exact controls `backprop` and `reversible` run the same stages without delay: up and down within one tick.

One process runs all stages, or each of several ranks runs some of them (`world`): the same tick, the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from petra_zoo.errors import UserError
from petra_zoo.petra.assembly import first_trainable, make_stages, require_all_parameters, require_one_stage_each
from petra_zoo.petra.capture import CapturedTicks, Graphs, graphs_for
from petra_zoo.petra.cast_weights import precision
from petra_zoo.petra.clock import Clock
from petra_zoo.petra.finite import FiniteCheck, OnNonfinite
from petra_zoo.petra.gather import keep_only, whole_model
from petra_zoo.petra.generator import own_generators
from petra_zoo.petra.layout import Layout
from petra_zoo.petra.messages import Output, Up
from petra_zoo.petra.methods import Method, find_method
from petra_zoo.petra.optimization import Optimization
from petra_zoo.petra.part import Loss, StageSettings
from petra_zoo.petra.pipeline_state import PipelineState, restore, state_of
from petra_zoo.petra.prediction import Batches, predict_batches
from petra_zoo.petra.preparing import Images, Prepare, fed_streams, prepared_units
from petra_zoo.petra.probes import Probe
from petra_zoo.petra.process_links import make_links
from petra_zoo.petra.stream_watch import StreamWatch
from petra_zoo.petra.tick import run_tick
from petra_zoo.petra.trained import TrainedWatch
from petra_zoo.petra.world import World
from petra_zoo.reversible import UnitModel, units_of


class Pipeline:
    """Trains a model cut into stages.

    In one process the model's own parameters and buffers are the live ones: they can be read, saved or evaluated at any
    time. A rank of several keeps its own stages' only, on its device; the others move to the meta device.

    Args:
        model: any `nn.Module` with `units()`, in train mode. Every rank builds the same one.
        layout: number of stages J, balanced by operation count; or units per stage; or a `Layout`, which may be
            balanced by measured costs and says which rank has which stages.
        method: ``'petra'``; its ancestors ``'dsp'`` (inputs buffered) and ``'delayed'`` (graph and parameters kept);
            ``'local'``, where every stage learns from a loss of its own and no gradient travels down; the exact
            controls ``'backprop'`` and ``'reversible'``, which have no delay; or a `Method`.
        optimization: optimizer, schedule, accumulation and clipping; default: gradients are found, nothing is updated.
        loss: (logits, labels) -> 0-d mean loss; labels may be soft.
        autocast: run units under autocast to this type, for example torch.bfloat16. With torch.float16 every stage
            scales its gradients (see `petra_zoo.petra.loss_scale`), and leaves out micro-batches that overflow.
        seed: random numbers inside the model come from (seed, unit, micro-batch).
        prepare: what is done to images in front of the first unit: a function of what is fed, without parameters, that
            draws nothing and leaves its arguments as they are. What waits for the backward is what is fed: bytes, where
            it normalises them. To be captured in a graph, it must read nothing back and copy nothing to the device.
        world: this process among several, and how messages travel; see `petra_zoo.petra.join`.
        graphs: ``'auto'``: on a GPU, ticks that are all alike are replayed as CUDA graphs, see
            `petra_zoo.petra.capture`; ``'off'``: none are; or what makes a `Graph`, in the place of CUDA's.
        on_nonfinite: ``'stop'``: a loss or a gradient that is not finite ends the training; ``'skip'``: the micro-batch
            is left out of its window, and of batch norms' statistics where it made them such. Neither is ever applied.

    Raises:
        UserError: a setting that does not fit the model, with what would.

    Example:
        >>> sgd = Optimization(lambda named: torch.optim.SGD([p for _, p in named], 0.1))
        >>> pipeline = Pipeline(model, 4, optimization=sgd)
        >>> for images, labels in loader:
        ...     output = pipeline.step(images, labels)
        >>> pipeline.drain()
    """

    def __init__(
        self,
        model: UnitModel,
        layout: int | Sequence[int] | Layout,
        *,
        method: str | Method = "petra",
        optimization: Optimization | None = None,
        loss: Loss = F.cross_entropy,
        autocast: torch.dtype | None = None,
        seed: int = 0,
        prepare: Prepare | None = None,
        world: World | None = None,
        graphs: Graphs = "auto",
        on_nonfinite: OnNonfinite = "stop",
    ) -> None:
        self.model, self.method, self.prepare = model, find_method(method), prepare
        self.optimization = optimization or Optimization()
        self.world = world or World(device=next(model.parameters()).device)
        with precision(self.world.device, autocast):  # which decides how far apart anchors may be
            units = units_of(model)
        require_all_parameters(model, units)
        self.layout = Layout.of(model, layout, method=self.method, ranks=self.world.size)
        require_one_stage_each(model, units, self.layout)
        if self.world.size > 1:
            keep_only(units, self.layout.units_of_rank(self.world.rank), self.world.device)
        skips = on_nonfinite == "skip" or autocast == torch.float16  # where an overflow is nothing unusual
        make_graph = graphs_for(graphs, self.world, delayed=self.method.delayed, stages=len(self.layout.stages))
        self.settings = StageSettings(
            loss,
            self.optimization,
            seed,
            autocast,
            first_trainable=first_trainable(units),
            last_keeps_graph=self.method.last_stage_keeps_graph,
            across=self.world.across,
            patience=self.world.patience,
            static=make_graph is not None,
            finite=FiniteCheck(make_graph is not None, skips=skips, replicas=self.world.replicas),
        )
        lowest = self.layout.stage_of(self.settings.first_trainable)
        self.clock = Clock(len(self.layout.stages), self.method.delayed, self.method.gradients_travel, lowest)
        self.streams = StreamWatch([units[i] for i in self.layout.units_of_rank(self.world.rank)])
        if autocast == torch.float16:
            with precision(self.world.device, autocast):  # which decides what `auto` stands for
                self.streams.require_float32()
        parts = prepared_units(units, prepare)
        self.stages = make_stages(model, parts, self.layout, self.world.rank, self.method, self.settings, self.clock)
        self.trained = TrainedWatch(self.stages)
        # Until every stage has gone backward and updated once: what is done for the first time may take long.
        first_works = 2 * len(self.layout.stages) + self.optimization.accumulation_steps
        self.links = make_links(self.world, self.layout.ranks[self.world.rank], patient=first_works)
        self.captured = CapturedTicks(self, make_graph, self.world.device) if make_graph else None
        self.fed, self.windows = 0, 0
        self._probe: Probe | None = None

    # -- training -------------------------------------------------------------------------------------------------

    def step(self, images: Images | None = None, labels: Tensor | None = None) -> Output:
        """One tick: feeds a micro-batch and lets every stage work on what it received.

        Every rank calls it, the one that owns the stem with a micro-batch, the others without.

        Args:
            images: [B, C, H, W], or a tuple of all that `prepare` takes; must not be overwritten while in flight.
            labels: [B] class indices, or [B, classes] probabilities.

        Returns:
            Loss and logits of the micro-batch that reached the head in this tick.

        Raises:
            NotFiniteError: a loss or a gradient is infinite or not a number; names the first stage that has one. No
                such gradient has reached a parameter.
            UserError: the type of the streams, a grid or a coupling was changed while micro-batches are in flight, or a
                parameter was unfrozen.
        """
        self.streams.look(self.in_flight)
        self.trained.look()
        fed = None
        if self.world.first:
            if images is None or labels is None:
                raise UserError("the rank that owns the stem feeds images and labels")
            # Replicas see different micro-batches: random numbers must differ as well.
            fed = Up(self.fed * self.world.replicas + self.world.replica, fed_streams(images), labels)
            if self._probe:
                self._probe.saw_batch(fed)
        self.fed += 1
        output = self._run_tick(fed, feeding=True)
        self.settings.finite.look()
        if self.fed % self.optimization.accumulation_steps == 0:
            self.windows += 1
            for stage in self.stages:  # in one tick, though the stages' own updates come in several
                stage.advance_schedule(self.windows)
        return output

    def drain(self) -> list[Output]:
        """Runs the remaining 2 (J - 1) ticks without input, then updates from windows that are not full.

        Returns:
            What came out, in order.
        """
        self.streams.look(self.in_flight)
        outputs = []
        while self.in_flight:
            outputs.append(self._run_tick(None, feeding=False))
            self.settings.finite.look()
        with own_generators(self.world.device), self.captured.aside() if self.captured else nullcontext():
            for stage in reversed(self.stages):
                stage.update(partial=True)
        self.settings.finite.settle()
        return [output for output in outputs if output.micro_batch is not None]

    @property
    def tick(self) -> int:
        """Ticks run so far."""
        return self.clock.tick + 1

    @property
    def in_flight(self) -> int:
        """Micro-batches fed whose backward has not ended."""
        return self.clock.in_flight

    @property
    def delay(self) -> tuple[float, ...]:
        """D_j of every stage of the network, in updates; see `Method.delay`."""
        return self.method.delay(len(self.layout.stages), self.optimization.accumulation_steps)

    @property
    def skipped(self) -> int:
        """Micro-batches left out by a stage of this process so far; waits for the device.

        What a stage leaves out, those below it leave out too: over all processes it is the largest of these numbers.
        """
        return max(stage.gate.dropped for stage in self.stages)

    def _run_tick(self, fed: Up | None, feeding: bool) -> Output:
        """The next tick of the clock."""
        clock = self.clock
        clock.next_tick(feeding)
        self.settings.finite.tick = clock.tick
        self._expect(clock.tick + 1 if clock.delayed else clock.tick)
        if self.captured:
            return self.captured.run(fed)
        with own_generators(self.world.device):
            return run_tick(self.stages, self.links, clock, fed)

    def _expect(self, tick: int) -> None:
        """Tells the links which messages this rank will receive in a tick."""
        self.links.expect(
            tick,
            [stage.index for stage in self.stages if stage.index > 0 and self.clock.forward(stage.index, tick)],
            [stage.index for stage in self.stages if not stage.last and self.clock.backward(stage.index, tick)],
        )

    # -- measuring and saving -------------------------------------------------------------------------------------

    def predict(
        self, batches: Batches, count: int | None = None, model: UnitModel | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Runs batches through the stages, forward only and in eval mode; training goes on as if nothing had been.

        Every rank calls it and exhausts it. Messages in flight, statistics and modes stay as they are.

        Args:
            batches: images as in `step` and labels [B], wanted from the rank that owns the stem; the first is the
                largest.
            count: how many batches there are; one process finds out by itself.
            model: the model whose stages run (a moving average of this one's); default: the pipeline's own.

        Yields:
            Logits [B, classes] and labels, on the rank that owns the head.
        """
        model, autocast = model or self.model, self.settings.autocast
        running = self.fed > 0
        return predict_batches(model, batches, count, self.layout, self.world, autocast, running, self.prepare)

    def whole_model(self, model: UnitModel | None = None, scratch: Path | None = None) -> UnitModel | None:
        """The model, or a moving average of it, complete and on the CPU, on the rank that owns the head; else None.

        Every rank calls it. A large one lies in files in `scratch`, a folder, where there is one; see `gather`.
        """
        return whole_model(model or self.model, self.layout, self.world, scratch)

    @contextmanager
    def probe(self, every: int = 1) -> Iterator[Probe]:
        """Measures, while the context lasts, how good each stage's gradients are; see `Probe`.

        Args:
            every: measure every so many micro-batches; one measurement costs a backpropagation per stage.

        Raises:
            RuntimeError: the stages are spread over processes.
        """
        self._require_one_process("probe()", "train with the same seed in one process to measure")
        probe = Probe(units_of(self.model), self.stages, every)
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

    def state_dict(self) -> PipelineState:
        """Everything a bit-exact continuation needs: model, optimizers, schedules, counters, messages, FIFOs.

        A rank of several gives what its own stages have; those of all ranks together are what one process would give.
        The tensors are the live ones: copy or save them before the next step.
        """
        return state_of(self)

    def load_state_dict(self, state: PipelineState, images: int = 0) -> None:
        """Restores what `state_dict` gave, the model included, whichever processes gave it.

        Args:
            state: of all stages; a rank of several needs those of its own, and `sent` of the stages beside them.
            images: of a full micro-batch, where the first to be fed may be smaller.

        Raises:
            UserError: the state is of another method, partition or model, or its streams are of another type.
            RuntimeError: the stages are spread over processes, and messages are under way between them.
        """
        if self.world.size > 1 and self.fed:
            raise RuntimeError("load_state_dict() comes before the first step() where stages are spread over processes")
        self.links.begin_with(images)
        with own_generators(self.world.device):
            restore(self, state)
        self.settings.finite.forget()  # what was not finite may be why one goes back
