"""The training loop: feed the pipeline, watch what comes out, validate, save."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor

from petra_zoo.petra import Output, Pipeline
from petra_zoo.training.build import (
    build_loaders,
    build_model,
    build_pipeline,
    choose_device,
    data_config,
    memory_format,
    open_data,
)
from petra_zoo.training.datasets import ImageDataset
from petra_zoo.training.evaluation import Evaluation, evaluate
from petra_zoo.training.loader import ImageLoader
from petra_zoo.training.progress import Reporter, Speed
from petra_zoo.training.recipe import Recipe
from petra_zoo.training.run_directory import RunDirectory


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
    evaluation: Evaluation
    training_seconds: float
    interrupted: bool = False
    bad_images: int = 0


def train(recipe: Recipe, name: str = "run", reporter: Reporter | None = None) -> Result:
    """Trains by a recipe, from data to a saved checkpoint.

    Args:
        recipe: the settings.
        name: of the recipe, for the default run directory.
        reporter: who tells the user; default: the console.

    Raises:
        UserError: settings, data or disk do not allow it; what was saved before is still there.
    """
    train_data, val_data = open_data(recipe)
    device = choose_device(recipe.device)
    model = build_model(recipe, train_data)
    config = data_config(recipe, train_data, model)
    loaders = build_loaders(recipe, train_data, val_data, config, device)
    pipeline = build_pipeline(recipe, model, len(loaders[0]), config)
    directory = RunDirectory(recipe, name)
    return Run(recipe, pipeline, loaders, train_data, config, directory, reporter or Reporter()).train()


class Run:
    """One run in progress: a recipe's objects and what has been seen of them so far."""

    def __init__(
        self,
        recipe: Recipe,
        pipeline: Pipeline,
        loaders: tuple[ImageLoader, ImageLoader],
        train_data: ImageDataset,
        config: dict[str, Any],
        directory: RunDirectory,
        reporter: Reporter,
    ) -> None:
        self.recipe, self.pipeline, self.config = recipe, pipeline, config
        self.train_loader, self.val_loader = loaders
        self.train_data, self.directory, self.reporter = train_data, directory, reporter
        self.model = pipeline.model
        self.device = next(self.model.parameters()).device
        self.ema = ModelEmaV3(self.model, decay=recipe.model_ema_decay) if recipe.model_ema else None
        self.labels: dict[int, Tensor] = {}  # of micro-batches on their way to the head
        self.seconds = 0.0

    def train(self) -> Result:
        """Runs all epochs, drains the pipeline and saves the model after every validation."""
        epochs = self.recipe.epochs + self.recipe.cooldown_epochs
        if self.recipe.warmup_prefix:
            epochs += self.recipe.warmup_epochs
        evaluation: Evaluation | None = None
        interrupted = False
        with self.reporter:
            partition = [len(owned) for owned in self.pipeline.partition]
            self.reporter.start(self.recipe, partition, len(self.train_loader), epochs)
            self.reporter.show()
            try:
                for epoch in range(epochs):
                    train_loss = self.run_epoch(epoch, epochs)
                    last = epoch == epochs - 1
                    if last:
                        self.drain()
                    if last or (epoch + 1) % self.recipe.val_interval == 0:
                        evaluation = self.validate_and_save(epoch, train_loss)
            except KeyboardInterrupt:
                interrupted = True
                self.reporter.line("interrupted: saving the model as it is (weights only, the run cannot be continued)")
                evaluation = self.validate_and_save(None, float("nan"))
        assert evaluation is not None
        bad = len(self.train_data.bad_images)
        return Result(self.directory.path, evaluation, self.seconds, interrupted, bad)

    def run_epoch(self, epoch: int, epochs: int) -> float:
        """Feeds one epoch; micro-batches in flight stay in flight. Gives the mean loss of what came out."""
        self.model.train()
        self.train_loader.set_epoch(epoch)
        meter, speed = Meter(), Speed()
        batches, k = len(self.train_loader), self.recipe.accumulation_steps
        started = time.perf_counter()
        for i, (images, labels) in enumerate(self.train_loader):
            images = images.to(self.device, memory_format=memory_format(self.recipe), non_blocking=True)
            labels = labels.to(self.device, non_blocking=True)
            self.labels[self.pipeline.fed] = labels
            output = self.pipeline.step(images, labels)
            if self.ema and self.pipeline.fed % k == 0:
                self.ema.update(self.model)
            self.account(output, meter)
            done, images_per_second = epoch * batches + i + 1, speed.add(len(images))
            loss, top1 = meter.recent()
            fill = f"{self.pipeline.in_flight}/{2 * len(self.pipeline.stages) - 1}"
            self.reporter.batch(epoch, done, epochs * batches, len(images), loss, top1, images_per_second, fill)
            if self.pipeline.fed % (self.recipe.log_interval * k) == 0 and loss is not None:
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
        return meter.mean_loss()

    def drain(self) -> None:
        """Lets the micro-batches in flight finish."""
        started = time.perf_counter()
        meter = Meter()
        for output in self.pipeline.drain():
            self.account(output, meter)
        if self.ema:
            self.ema.update(self.model)
        self.seconds += time.perf_counter() - started

    def account(self, output: Output, meter: Meter) -> None:
        """Compares what came out with its labels."""
        if output.micro_batch is None or output.loss is None or output.logits is None:
            return
        labels = self.labels.pop(output.micro_batch)
        hard = labels.argmax(1) if labels.ndim == 2 else labels
        meter.add(float(output.loss), int((output.logits.argmax(1) == hard).sum()), len(hard))

    def validate_and_save(self, epoch: int | None, train_loss: float) -> Evaluation:
        """Evaluates the model (its moving average, where there is one), logs, and saves it."""
        started = time.perf_counter()
        model = self.ema.module if self.ema else self.model
        model.eval()

        def predict(images: Tensor) -> Tensor:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.amp):
                return model(images)

        result = evaluate(predict, self.val_loader, self.model.num_classes, self.device, memory_format(self.recipe))
        self.model.train()
        seconds = time.perf_counter() - started
        lr = self.learning_rate()
        if epoch is not None:
            self.directory.log(
                event="validation", epoch=epoch, top1=result.top1, top5=result.top5, loss=result.loss, seconds=seconds
            )
            row = {"epoch": epoch, "train_loss": train_loss, "eval_loss": result.loss}
            self.directory.summarize({**row, "eval_top1": result.top1, "eval_top5": result.top5, "lr": lr})
            self.reporter.epoch(epoch, train_loss, result, self.seconds)
        self.directory.save_model(model, self.config, self.train_data.class_names)
        return result

    def learning_rate(self) -> float:
        """Of the last stage; all stages have the same."""
        optimizers = [stage.optimizer for stage in self.pipeline.stages if stage.optimizer]
        return float(optimizers[-1].param_groups[0]["lr"]) if optimizers else 0.0


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

    def mean_loss(self) -> float:
        """Over everything; nan where nothing came out."""
        images = sum(row[2] for row in self.rows)
        return sum(row[0] * row[2] for row in self.rows) / images if images else float("nan")
