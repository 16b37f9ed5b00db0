"""A training step of one's own loop, replayed as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from petra_zoo.errors import UserError
from petra_zoo.petra.change_watch import ChangeWatch
from petra_zoo.petra.cuda_graph import CudaGraph, Device, Graph
from petra_zoo.petra.host_reads import HostReads
from petra_zoo.petra.rates import rates_of
from petra_zoo.petra.tick import Lanes
from petra_zoo.reversible.replay import units_that_draw
from petra_zoo.reversible.saturation import Saturation, saturations_in

_PLAIN = 2  # calls before the one that is watched
_OTHER_FORMS = 8  # calls in a row with inputs of another form: then they are what there is


class GraphedStep:
    """A step that runs as ever for three calls, is captured in the fourth, and replayed from then on.

    It must do the same with the same tensors in every call, and clear its gradients itself. Inputs of another form than
    in the call that was captured (a smaller last batch) run as ever; on the CPU all calls do. What replaces a tensor of
    the model or of the optimizer's state, or a coupling, drops the graph.

    Args:
        step: takes tensors and gives one, such as the loss: forward, backward and, with `optimizer`, its update.
        model: what it runs.
        optimizer: whose `step` it calls; schedules set its learning rate as ever.
        make_graph: an empty graph in the place of CUDA's.

    Raises:
        UserError: the optimizer's update cannot be captured; when it is called: nor can the step, and why; or a stream
            on a grid was beyond its range, in this call or the one before.

    Example:
        >>> def step(images, labels):
        ...     optimizer.zero_grad()
        ...     loss = F.cross_entropy(model(images), labels)
        ...     loss.backward()
        ...     optimizer.step()
        ...     return loss
        >>> step = GraphedStep(step, model, optimizer)
        >>> for images, labels in loader:
        ...     loss = step(images, labels)
    """

    def __init__(
        self,
        step: Callable[..., Tensor],
        model: nn.Module,
        optimizer: Optimizer | None = None,
        *,
        make_graph: Callable[[], Graph] | None = None,
    ) -> None:
        self.step, self.model, self.make_graph = step, model, make_graph
        device = next(model.parameters()).device
        self._captures = make_graph is not None or device.type == "cuda"
        self._rates = rates_of(optimizer, device) if optimizer and self._captures else None
        if self._captures and optimizer and self._rates is None:
            raise UserError(
                f"the update of {type(optimizer).__name__} cannot be captured: call optimizer.step() behind the step, "
                "and leave it out here"
            )
        self._watch = ChangeWatch(model.modules, [optimizer] if optimizer else [], updates_beside=optimizer is None)
        self._forget()

    def __call__(self, *inputs: Tensor) -> Tensor:
        if not self._captures:
            return self.step(*inputs)
        if self._watch.changed():
            self._forget()
        if self._watch.hooked:  # a hook wants to be called in every step
            return self._run(inputs)
        if self._graph is None:
            self._calls += 1
            if self._calls <= _PLAIN:
                return self._run(inputs)
            if self._calls == _PLAIN + 1:
                return self._rehearse(inputs)
            self._capture(inputs)
        if list(map(_form, inputs)) == self._forms:
            self._odd = 0
            return self._replay(inputs)
        self._odd += 1
        if self._odd > _OTHER_FORMS:
            self._forget()
        return self._run(inputs)

    def _forget(self) -> None:
        self._graph: Graph | None = None
        self._gradients: list[tuple[nn.Parameter, Tensor | None]] = []
        self._saturations: list[Saturation] = []
        self._calls = 0
        self._odd = 0

    def _run(self, inputs: tuple[Tensor, ...]) -> Tensor:
        with ExitStack() as stack:
            if self._rates:
                stack.enter_context(self._rates.on_device())
            # Without its graph: what accumulates gradients would go on in the stream of an earlier call.
            result = self.step(*inputs).detach()
        self._watch.look()  # an update that is not replayed counts as a modification
        return result

    def _rehearse(self, inputs: tuple[Tensor, ...]) -> Tensor:
        if self._rates:
            self._rates.refresh()
        numbers = [x for x in self.model.buffers() if x.ndim == 0]  # couplings: watched
        with HostReads(numbers) as reads, units_that_draw() as drawing:
            result = self._run(inputs)
        if reads.found:
            raise UserError(f"the step cannot be captured: in it, {reads.found[0]}")
        if drawing:
            raise UserError(
                "the step cannot be captured: its backward has to repeat random numbers of the forward (dropout or "
                "stochastic depth in a reversible network); leave them out, set_memory('plain'), or take a Pipeline "
                "of one stage with method='reversible', which can do it"
            )
        return result

    def _capture(self, inputs: tuple[Tensor, ...]) -> None:
        make_graph = self.make_graph or (lambda: CudaGraph(Device(inputs[0].device, lanes=1)))
        self._inputs, self._forms = tuple(x.clone() for x in inputs), [_form(x) for x in inputs]
        graph = make_graph()

        def work(lanes: Lanes) -> None:
            self._output = self._run(self._inputs)

        try:
            graph.capture(work, ())
        except RuntimeError as error:
            raise UserError(f"the step cannot be captured: {str(error).strip().splitlines()[0]}") from error
        self._graph = graph
        self._gradients = [(p, p.grad) for p in self.model.parameters()]
        self._saturations = saturations_in(self.model)

    def _replay(self, inputs: tuple[Tensor, ...]) -> Tensor:
        assert self._graph
        for there, x in zip(self._inputs, inputs, strict=True):
            there.copy_(x, non_blocking=True)
        if self._rates:
            self._rates.refresh()
        self._graph.replay(())
        for saturation in self._saturations:  # the graph notes what streams see of their range
            saturation.look()
        for p, gradient in self._gradients:  # a call that ran as ever, or whoever updates, has put others there
            p.grad = gradient
        return self._output.clone()


def _form(x: Tensor) -> tuple[torch.Size, tuple[int, ...], torch.dtype, torch.device]:
    return x.shape, x.stride(), x.dtype, x.device
