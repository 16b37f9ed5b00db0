"""What Python code is told of a run in progress: plain numbers, where something is logged anyway.

Events come on the process that sees the losses (the last rank of the first replica), and there only. None of them
holds a tensor: whoever listens costs no synchronisation with a device. A callback that raises ends the run.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class StartEvent:
    """A run is about to feed its first micro-batch.

    Attributes:
        path: the run directory.
        epochs: how many there will be.
        batches_per_epoch: micro-batches that one replica feeds in each.
        stages, processes: of the run.
        delay: D_0, how many updates old the first stage's gradients are.
        parameters: of the network, the frozen ones included.
    """

    path: Path
    epochs: int
    batches_per_epoch: int
    stages: int
    processes: int
    delay: float
    parameters: int


@dataclass(frozen=True)
class LogEvent:
    """`log_interval` updates later: what metrics.jsonl says too.

    Attributes:
        epoch: from 1.
        update, tick: how many there have been.
        loss, top1: over the last micro-batches that came out; top1 in percent.
        lr: the schedule's learning rate.
        images_per_second: fed by all replicas, over the last seconds.
    """

    epoch: int
    update: int
    tick: int
    loss: float
    top1: float
    lr: float
    images_per_second: float


@dataclass(frozen=True)
class ValidationEvent:
    """The model (its moving average, where there is one) was validated and saved: what summary.csv says too.

    Attributes:
        epoch: from 1.
        train_loss: over the epoch; None where nothing has come out of the pipeline yet.
        loss, top1, top5: on the validation split; accuracies in percent.
        lr: the schedule's learning rate.
        training_seconds: so far, validation and saving apart.
    """

    epoch: int
    train_loss: float | None
    loss: float
    top1: float
    top5: float
    lr: float
    training_seconds: float


@dataclass(frozen=True)
class EndEvent:
    """The run is over, and its directory complete.

    Attributes:
        path: the run directory.
        loss, top1, top5: of the model saved there, on the validation split.
        training_seconds: validation and saving apart.
    """

    path: Path
    loss: float
    top1: float
    top5: float
    training_seconds: float


class Callback:
    """To inherit from: override what you want to hear of.

    Example:
        >>> class Best(Callback):
        ...     top1 = 0.0
        ...     def on_validation(self, event):
        ...         self.top1 = max(self.top1, event.top1)
        >>> train("digits/petra_revnet_tiny", callbacks=[best := Best()])
    """

    def on_start(self, event: StartEvent) -> None:
        """Before the first tick."""

    def on_log(self, event: LogEvent) -> None:
        """Every `log_interval` updates, once something has come out of the pipeline."""

    def on_validation(self, event: ValidationEvent) -> None:
        """After every validation, when the model is saved."""

    def on_end(self, event: EndEvent) -> None:
        """At the end of a run; one that was stopped, to be continued, has not ended."""
