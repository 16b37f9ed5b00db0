"""Validation of the model in training, and of what is saved: its moving average, where there is one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from torch import nn

from petra_zoo.errors import UserError
from petra_zoo.evaluation.scores import Scores, score
from petra_zoo.models.classifier import as_classifier
from petra_zoo.training.adapters import merge_adapters
from petra_zoo.training.observer import Observer
from petra_zoo.training.preparation import Prepared
from petra_zoo.training.ranks import average_statistics, held

T = TypeVar("T")


def validate(run: Prepared, observer: Observer) -> Scores | None:
    """Evaluates the model through the pipeline of the first replica, and has it saved; what is in flight stays there.

    Args:
        run: in progress.
        observer: of it.

    Returns:
        The evaluation, on the rank that reports.

    Raises:
        Failure: the model or its loss is not finite; it is not saved.
        UserError: there is no room to save it.
    """
    model = run.ema.module if run.ema else run.model
    average_statistics(model, run.world)
    with held(run.world) as alive:
        if run.world.replica > 0:
            return None
        started = time.perf_counter()
        model.eval()
        batches = run.batches(run.val_loader) if run.world.first else ()
        predicted = run.pipeline.predict(batches, len(run.val_loader), model)
        scores = score(_telling(alive, predicted), run.model.num_classes)
        run.model.train()
        scratch = observer.directory.path if observer.directory else None
        try:
            whole = run.pipeline.whole_model(model, scratch)
        except OSError as error:
            raise UserError(f"no room in {scratch} to put the model together: {error.strerror}") from error
        if whole is None:
            return None
        assert isinstance(whole, nn.Module)
        merge_adapters(whole)
        observer.validated(scores, as_classifier(whole), time.perf_counter() - started)
        return scores


def _telling(alive: Callable[[], None], predicted: Iterable[T]) -> Iterator[T]:
    """The same, with a sign of life for each."""
    for found in predicted:
        alive()
        yield found
