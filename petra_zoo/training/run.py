"""The training loop: feed the pipeline, watch what comes out, validate, save."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.utils import ModelEmaV3
from torch import Tensor

from petra_zoo.data.datasets import ImageDataset
from petra_zoo.data.loader import ImageLoader
from petra_zoo.errors import Failure
from petra_zoo.evaluation.scores import Scores, score
from petra_zoo.files import check_free
from petra_zoo.petra import NotFiniteError, Output, Pipeline, World, first_not_finite, leave
from petra_zoo.settings.recipe import Recipe
from petra_zoo.training.build import (
    build_loaders,
    build_model,
    build_pipeline,
    check_feed,
    data_config,
    find_profile,
    learning_rates,
    memory_format,
    open_data,
    share_profile,
)
from petra_zoo.training.coupling_schedule import CouplingSchedule, start_schedule
from petra_zoo.training.distillation import Distillation, build_distillation
from petra_zoo.training.finetuning import start_lines
from petra_zoo.training.progress import Reporter, Speed
from petra_zoo.training.ranks import average_statistics, enter, held, together
from petra_zoo.training.run_directory import RunDirectory, record_run
from petra_zoo.training.synchronized_norms import synchronize_statistics

ADVICE = "lower the learning rate, set clip_grad, or look for bad images"


@dataclass(frozen=True)
class Result:
    """What a run left behind.

    Attributes:
        path: the run directory.
        evaluation: of the model saved there, on the validation split.
        training_seconds: time spent training, validation and saving apart.
        interrupted: whether the run was stopped before its last epoch.
        bad_images: how many training images could not be read and were skipped.
    """

    path: Path
    evaluation: Scores
    training_seconds: float
    interrupted: bool = False
    bad_images: int = 0


def train(recipe: Recipe, name: str = "run", reporter: Reporter | None = None) -> Result:
    """Trains by a recipe, from data to a saved checkpoint, with the processes that were launched together.

    Args:
        recipe: the settings.
        name: of the recipe, for the default run directory.
        reporter: who tells the user; default: the console, on the rank that sees the losses.

    Raises:
        UserError: settings, data or disk do not allow it; what was saved before is still there. Every process raises
            it, whichever one found the mistake.
        Failure: training has diverged; likewise.
    """
    world = enter(recipe)
    try:
        return prepare(recipe, name, reporter or Reporter(quiet=not world.reports), world).train()
    finally:
        leave()


def prepare(recipe: Recipe, name: str, reporter: Reporter, world: World) -> Run:
    """From a recipe to a run that is ready to start."""

    def build() -> tuple[ImageDataset, Any, dict[str, Any], tuple[ImageLoader, ImageLoader]]:
        if recipe.output and world.reports:
            check_free(recipe.output, "output=DIR")  # now, before data is fetched and the model is measured
        train_data, val_data = open_data(recipe)
        # A rank of several builds the whole model on the CPU and keeps its own stages.
        model = build_model(recipe, train_data, world.device if world.size == 1 else torch.device("cpu"))
        config = data_config(recipe, train_data, model)
        loaders = build_loaders(recipe, train_data, val_data, config, world)
        check_feed(recipe, loaders[0], model, config)
        return train_data, model, config, loaders

    train_data, model, config, loaders = together(world, build)
    profile = share_profile(together(world, lambda: find_profile(recipe, model, config, world)), world)

    def start() -> tuple[Pipeline, RunDirectory | None, CouplingSchedule | None, Distillation | None]:
        if recipe.sync_bn and world.replicas > 1:  # not before: a profile is measured by one process alone
            synchronize_statistics(model, world)
        schedule = start_schedule(recipe, model)
        distillation = build_distillation(recipe, model.num_classes, config, world.device, train_data, world.first)
        loss = distillation.loss if distillation else F.cross_entropy
        pipeline = build_pipeline(recipe, model, len(loaders[0]), config, world, profile, loss)
        directory = RunDirectory(recipe, name) if world.reports else None
        if directory and profile:
            profile.save(directory.path / "profile.json")
        return pipeline, directory, schedule, distillation

    pipeline, directory, schedule, distillation = together(world, start)
    return Run(recipe, pipeline, loaders, train_data, config, directory, reporter, schedule, distillation)


class Run:
    """One run in progress: a recipe's objects and what has been seen of them so far.

    Every rank has one and calls the same methods: the one that owns the stem feeds, the one that owns the head sees
    what comes out and has the run directory.
    """

    def __init__(
        self,
        recipe: Recipe,
        pipeline: Pipeline,
        loaders: tuple[ImageLoader, ImageLoader],
        train_data: ImageDataset,
        config: dict[str, Any],
        directory: RunDirectory | None,
        reporter: Reporter,
        schedule: CouplingSchedule | None = None,
        distillation: Distillation | None = None,
    ) -> None:
        self.recipe, self.pipeline, self.config = recipe, pipeline, config
        self.train_loader, self.val_loader = loaders
        self.train_data, self.directory, self.reporter = train_data, directory, reporter
        self.schedule, self.distillation = schedule, distillation
        self.model, self.world = pipeline.model, pipeline.world
        self.device = self.world.device
        self.ema = ModelEmaV3(self.model, decay=recipe.model_ema_decay) if recipe.model_ema else None
        self.rate = learning_rates(recipe, len(self.train_loader))
        self.started = time.perf_counter()
        self.seconds = 0.0

    def train(self) -> Result:
        """Runs all epochs, drains the pipeline and saves the model after every validation."""
        epochs = self.recipe.epochs + self.recipe.cooldown_epochs
        if self.recipe.warmup_prefix:
            epochs += self.recipe.warmup_epochs
        evaluation: Scores | None = None
        interrupted = False
        with self.reporter:
            self.reporter.start(self.recipe, self.pipeline, len(self.train_loader), epochs)
            for line in start_lines(self.recipe, self.model, self.train_data.class_names):
                self.reporter.line(line)
            if left_out := self.train_loader.left_out:
                why = "the rest, other ones every time" if self.world.replicas > 1 else "a last micro-batch of one"
                self.reporter.line(f"an epoch leaves out {left_out} of {len(self.train_data)} images: {why}")
            self.reporter.show()
            try:
                for epoch in range(epochs):
                    if self.schedule and self.schedule.moves(epoch):
                        self.drain()  # nothing may be in flight
                        self.schedule.apply(epoch, self.model, *([self.ema.module] if self.ema else []))
                    meter = self.run_epoch(epoch, epochs)
                    last = epoch == epochs - 1
                    if last:
                        self.drain(meter)
                    if last or (epoch + 1) % self.recipe.val_interval == 0:
                        evaluation = self.validate_and_save(epoch, meter.mean_loss())
            except NotFiniteError as error:
                raise self.diverged(error, epoch) from error
            except KeyboardInterrupt:
                if not self.world.alone:  # ranks stop in different ticks: the last saved epoch is what there is
                    raise
                interrupted = True
                self.reporter.line("interrupted: saving the model as it is (weights only, the run cannot be continued)")
                evaluation = self.validate_and_save(None, None)
        bad = sum(self.world.gather(len(self.train_data.bad_images)))
        path = self.directory.path if self.directory else None
        if path is not None and evaluation is not None:
            wall = time.perf_counter() - self.started
            record_run(path, self.recipe, evaluation, self.world.size, wall_seconds=wall, training_seconds=self.seconds)
        path, evaluation = self.world.from_reporter((path, evaluation))
        assert path is not None
        assert evaluation is not None
        return Result(path, evaluation, self.seconds, interrupted, bad)

    def diverged(self, error: NotFiniteError, epoch: int) -> Failure:
        """What to tell when training cannot go on, where it is known: which tensor was hit, and what is on disk."""
        hit = first_not_finite(self.model)
        also = f", and so is {hit}" if hit else ""
        kept = self.directory.what_is_kept() if self.directory else "what was saved before is kept"
        return Failure(
            f"training stopped in epoch {epoch + 1}, tick {self.pipeline.tick}: {error}{also}; no model is saved, "
            f"{kept}: {ADVICE}"
        )

    def run_epoch(self, epoch: int, epochs: int) -> Meter:
        """Feeds one epoch; micro-batches in flight stay in flight. Gives what came out."""
        self.model.train()
        self.train_loader.set_epoch(epoch)
        meter, speed = Meter(), Speed()
        batches, k = len(self.train_loader), self.recipe.accumulation_steps
        started = time.perf_counter()
        for i, (images, labels) in enumerate(self.feed(self.train_loader)):
            if self.distillation and images is not None and labels is not None:
                labels = self.distillation.labels(images, labels)
            output = self.pipeline.step(images, labels)
            if self.ema and self.pipeline.fed % k == 0:
                self.ema.update(self.model)
            if not self.world.reports:
                continue
            self.account(output, meter)
            images_fed = self.recipe.batch_size * self.recipe.data_parallel
            done, images_per_second = epoch * batches + i + 1, speed.add(images_fed)
            loss, top1 = meter.recent()
            fill = f"{self.pipeline.in_flight}/{2 * len(self.pipeline.partition) - 1}"
            self.reporter.batch(epoch, done, epochs * batches, images_fed, loss, top1, images_per_second, fill)
            if self.pipeline.fed % (self.recipe.log_interval * k) == 0 and loss is not None and self.directory:
                self.directory.log(
                    event="train",
                    epoch=epoch,
                    update=self.pipeline.fed // k,
                    tick=self.pipeline.tick,
                    loss=loss,
                    top1=top1,
                    lr=self.learning_rate(),
                    images_per_second=images_per_second,
                )
        self.seconds += time.perf_counter() - started
        return meter

    def feed(self, loader: ImageLoader) -> Iterator[tuple[Tensor | None, Tensor | None]]:
        """Batches on the device, on the rank that owns the stem; as many times nothing on the others."""
        if not self.world.first:
            yield from repeat((None, None), len(loader))
            return
        for images, labels in loader:
            images = images.to(self.device, memory_format=memory_format(self.recipe), non_blocking=True)
            yield images, labels.to(self.device, non_blocking=True)

    def drain(self, meter: Meter | None = None) -> None:
        """Lets the micro-batches in flight finish; the meter gets what comes out."""
        started = time.perf_counter()
        meter = meter or Meter()
        for output in self.pipeline.drain():
            self.account(output, meter)
        if self.ema:
            self.ema.update(self.model)
        self.seconds += time.perf_counter() - started

    def account(self, output: Output, meter: Meter) -> None:
        """Compares what came out with its labels."""
        if output.loss is None or output.logits is None or output.labels is None:
            return
        labels = output.labels if self.distillation is None else self.distillation.own(output.labels)
        hard = labels.argmax(1) if labels.ndim == 2 else labels
        meter.add(float(output.loss), int((output.logits.argmax(1) == hard).sum()), len(hard))

    def validate_and_save(self, epoch: int | None, train_loss: float | None) -> Scores | None:
        """Evaluates the model (its moving average, where there is one), logs, and saves it.

        Through the pipeline of the first replica: what is in flight stays where it is.

        Returns:
            The evaluation, on the rank that reports.

        Raises:
            Failure: the model or its loss is not finite; it is not saved.
        """
        model = self.ema.module if self.ema else self.model
        average_statistics(model, self.world)
        with held(self.world):
            return self.validate(model, epoch, train_loss) if self.world.replica == 0 else None

    def validate(self, model: Any, epoch: int | None, train_loss: float | None) -> Scores | None:
        """`validate_and_save` in the first replica."""
        started = time.perf_counter()
        model.eval()
        batches = self.feed(self.val_loader) if self.world.first else ()
        pairs = self.pipeline.predict(batches, len(self.val_loader), model)  # type: ignore[arg-type]
        result = score(pairs, self.model.num_classes)
        self.model.train()
        whole = self.pipeline.whole_model(model)
        if not self.directory:
            return None
        seconds = time.perf_counter() - started
        if epoch is not None:
            self.directory.log(
                event="validation", epoch=epoch, top1=result.top1, top5=result.top5, loss=result.loss, seconds=seconds
            )
        if not math.isfinite(result.loss):
            kept = self.directory.what_is_kept()
            raise Failure(f"the validation loss is {result.loss}: the model is not saved, {kept}: {ADVICE}")
        self.directory.save_model(whole, self.config, self.train_data.class_names)
        if epoch is not None:
            row = {"epoch": epoch, "train_loss": train_loss, "eval_loss": result.loss}
            rate = self.learning_rate()
            self.directory.summarize({**row, "eval_top1": result.top1, "eval_top5": result.top5, "lr": rate})
            self.reporter.epoch(epoch, train_loss, result, self.seconds)
        return result

    def learning_rate(self) -> float:
        """The schedule's; `layer_decay` scales it layer by layer."""
        return self.rate(self.pipeline.fed // self.recipe.accumulation_steps)


class Meter:
    """Loss and accuracy of what came out of the pipeline."""

    WINDOW = 50

    def __init__(self) -> None:
        self.rows: list[tuple[float, int, int]] = []

    def add(self, loss: float, correct: int, images: int) -> None:
        self.rows.append((loss, correct, images))

    def recent(self) -> tuple[float | None, float]:
        """Mean loss and accuracy in percent over the last micro-batches; no loss before the first came out."""
        rows = self.rows[-self.WINDOW :]
        images = sum(row[2] for row in rows)
        if not images:
            return None, 0.0
        return sum(row[0] * row[2] for row in rows) / images, 100.0 * sum(row[1] for row in rows) / images

    def mean_loss(self) -> float | None:
        """Over everything; None where nothing came out: the pipeline was filling."""
        images = sum(row[2] for row in self.rows)
        return sum(row[0] * row[2] for row in self.rows) / images if images else None
