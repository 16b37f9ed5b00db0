"""One training run of an accuracy study, and what is measured of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

from petra_zoo.petra.probes import Measurement
from petra_zoo.settings.recipe import Recipe
from petra_zoo.strict_json import Json, JsonObject
from petra_zoo.training import Callback, Reporter, Run, StartEvent, prepare, train


class _Start(Callback):
    """Hears how much there is to train."""

    def __init__(self) -> None:
        self.batches, self.parameters = 0, 0

    def on_start(self, event: StartEvent) -> None:
        self.batches, self.parameters = event.epochs * event.batches_per_epoch, event.parameters


def measured_training(recipe: Recipe, probe: int | None) -> JsonObject:
    """Trains, as `petra-zoo train` does, and gives what there is to tell.

    Args:
        recipe: with its output.
        probe: measure every stage's gradient every so many micro-batches.

    Returns:
        top1 and top5 in percent and the loss, on `validation_images`; `seconds` of training, validation and saving
        apart, and images per second of those; parameters; with a probe, its measurements,
        a list for each of their attributes.

    Raises:
        Failure: training has diverged.
    """
    start, quiet = _Start(), Reporter(quiet=True)
    recipe = recipe.model_copy(update={"checkpoint_every": None})  # a study begins a run anew that was cut short
    probed: JsonObject = {}
    if probe is None:
        result = train(recipe, callbacks=[start], reporter=quiet)
    else:
        prepared = prepare(recipe)
        with prepared.pipeline.probe(probe) as watching:
            result = Run(prepared, quiet, [start]).train()
        probed = {"probe": _columns(watching.measurements)}
    scores, seconds = result.evaluation, result.training_seconds
    return {
        "top1": scores.top1,
        "loss": scores.loss,
        "images_per_second": start.batches * recipe.batch_size * recipe.data_parallel / seconds,
        "seconds": seconds,
        "top5": scores.top5,
        "validation_images": scores.images,
        "parameters": start.parameters,
        **probed,
    }


def _columns(measurements: Sequence[Measurement]) -> JsonObject:
    names = [field.name for field in fields(Measurement)]
    return {name: [_short(getattr(measurement, name)) for measurement in measurements] for name in names}


def _short(value: Json) -> Json:
    """Four digits: a run has thousands of these numbers."""
    return float(f"{value:.4g}") if isinstance(value, float) else value
