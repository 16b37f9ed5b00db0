"""Probes: how good the approximate gradient is.

For a stage and a micro-batch: the stage's gradient against exact backpropagation of the same micro-batch through the
whole model with the parameters of the stage's backward tick, and the stage's reconstructed input against what it
received in its forward.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from petra_zoo.petra.messages import Up
from petra_zoo.petra.stage import Stage
from petra_zoo.reversible import Streams, Unit, gradients_of


@dataclass(frozen=True)
class Measurement:
    """One stage's backward of one micro-batch.

    Attributes:
        cosine: between the stage's gradient and the exact one, over all its parameters.
        norm_ratio: norm of the stage's gradient over the exact one's.
        reconstruction_error: relative error ||x~ - x|| / ||x|| of the stage's input; None where it is not used.
    """

    stage: int
    micro_batch: int
    cosine: float
    norm_ratio: float
    reconstruction_error: float | None


class Probe:
    """Collects measurements while attached; see `Pipeline.probe`.

    It keeps images, labels and stage inputs of the micro-batches it has seen from the start, and runs a
    backpropagation per stage and measured micro-batch: a tool for looking, not for timing.

    Attributes:
        measurements: in the order in which the backwards happened.
    """

    def __init__(self, units: Sequence[Unit], stages: Sequence[Stage], every: int = 1) -> None:
        self.units = list(units)
        self.stages = list(stages)
        self.every = every
        self.measurements: list[Measurement] = []
        self._batches: dict[int, Up] = {}
        self._inputs: dict[tuple[int, int], Streams] = {}
        self._measured: Counter[int] = Counter()  # stages, by micro-batch

    def saw_batch(self, up: Up) -> None:
        if up.micro_batch % self.every == 0:
            self._batches[up.micro_batch] = up

    def saw_forward(self, stage: Stage, up: Up) -> None:
        if stage.goes_backward and up.micro_batch in self._batches:
            self._inputs[stage.first_unit, up.micro_batch] = up.streams

    def saw_backward(self, stage: Stage, micro_batch: int, inputs: Streams, gradients: dict[int, Tensor]) -> None:
        batch = self._batches.get(micro_batch)
        received = self._inputs.pop((stage.first_unit, micro_batch), None)
        if batch is None or received is None:
            return
        self._measured[micro_batch] += 1
        if self._measured[micro_batch] == sum(stage.goes_backward for stage in self.stages):
            del self._batches[micro_batch], self._measured[micro_batch]
        # Without the auxiliary head's, which the network's loss has no gradient for.
        parameters = [p for group in stage.parameters[: len(stage.units)] for p in group]
        if not parameters:  # frozen, with something to train below
            return
        exact = self._exact_gradients(batch, parameters)
        found = [gradients.get(id(p)) for p in parameters]
        ours = _flat(found, parameters)
        reference = _flat(exact, parameters)
        tiny = torch.finfo(torch.float64).tiny
        error = None
        if inputs and stage.first_unit > 0:
            now, then = _flat(inputs, received), _flat(received, received)
            error = float((now - then).norm() / then.norm().clamp_min(tiny))
        self.measurements.append(
            Measurement(
                stage=stage.index,
                micro_batch=micro_batch,
                cosine=float(ours @ reference / (ours.norm() * reference.norm()).clamp_min(tiny)),
                norm_ratio=float(ours.norm() / reference.norm().clamp_min(tiny)),
                reconstruction_error=error,
            )
        )

    def _exact_gradients(self, batch: Up, parameters: list[torch.nn.Parameter]) -> Sequence[Tensor | None]:
        streams = batch.streams
        with torch.enable_grad(), ExitStack() as stack:
            for unit in self.units:
                stack.enter_context(unit.untouched())
            for stage in self.stages:
                streams = stage.run_units(streams, batch.micro_batch, own_weights=True)
        logits = streams[0]
        with torch.enable_grad():
            loss = self.stages[-1].settings.loss(
                logits if logits.dtype == torch.float64 else logits.float(), batch.labels
            )
        return gradients_of((loss,), (torch.ones_like(loss),), list(parameters))


def _flat(tensors: Sequence[Tensor | None], like: Sequence[Tensor]) -> Tensor:
    """All tensors as one float64 vector; None counts as zeros."""
    return torch.cat(
        [
            (torch.zeros_like(y) if x is None else x).detach().double().flatten()
            for x, y in zip(tensors, like, strict=True)
        ]
    )
