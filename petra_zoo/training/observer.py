"""What becomes of a run's numbers: a run directory, a console, and whoever wants to be called back."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from petra_zoo.errors import Failure
from petra_zoo.evaluation.scores import Scores
from petra_zoo.models.classifier import Classifier
from petra_zoo.petra import Output
from petra_zoo.training.callbacks import Callback, EndEvent, LogEvent, StartEvent, ValidationEvent
from petra_zoo.training.finetuning import start_lines
from petra_zoo.training.meter import Meter, Speed
from petra_zoo.training.optimization import learning_rates
from petra_zoo.training.preparation import Prepared
from petra_zoo.training.progress import Reporter
from petra_zoo.training.run_directory import RunDirectory, record_run

SHOWN_EVERY = 1.0  # seconds between two readings for a person to see: each waits for the device
ADVICE = "lower the learning rate, set clip_grad, or look for bad images"


class Observer:
    """Sees what a run does and tells it; only the rank that reports sees losses and has a run directory.

    Args:
        run: what runs.
        reporter: who tells the user.
        callbacks: who else is told.

    Attributes:
        directory: where the run is written, on the rank that reports, once it has begun.
        training_seconds: so far, validation and saving apart.
    """

    def __init__(self, run: Prepared, reporter: Reporter, callbacks: Sequence[Callback] = ()) -> None:
        self.run, self.reporter, self.callbacks = run, reporter, callbacks
        self.started = time.perf_counter()
        self.training_seconds = 0.0
        self.epochs = run.recipe.total_epochs
        self.epoch, self.batches_done = 0, 0
        self.meter, self.speed = Meter(), Speed()
        self._recent: tuple[float | None, float] = (None, 0.0)  # loss and accuracy as they were last read
        self._read_at = 0.0
        self.directory: RunDirectory | None = None
        self._rate = learning_rates(run.recipe, len(run.train_loader))

    def open_directory(self) -> None:
        """Makes the run directory.

        Raises:
            UserError: it holds anything, or cannot be written.
        """
        if self.run.world.reports:
            self.directory = RunDirectory(self.run.recipe, self.run.name)
            if self.run.profile:
                self.run.profile.save(self.directory.path / "profile.json")

    @contextmanager
    def training(self) -> Iterator[None]:
        """What is done in here counts as training."""
        started = time.perf_counter()
        yield
        self.training_seconds += time.perf_counter() - started

    def start(self) -> None:
        """Says what is about to run."""
        run, batches = self.run, len(self.run.train_loader)
        self.reporter.start(run.recipe, run.pipeline, batches, self.epochs)
        for line in start_lines(run.recipe, run.model, run.data.class_names):
            self.reporter.line(line)
        if left_out := run.train_loader.left_out:
            why = "the rest, other ones every time" if run.world.replicas > 1 else "a last micro-batch of one"
            self.reporter.line(f"an epoch leaves out {left_out} of {len(run.data)} images: {why}")
        self.reporter.show()
        if self.directory:
            parameters = sum(p.numel() for p in run.model.parameters())  # on the meta device too
            processes = run.world.size * run.world.replicas
            stages = len(run.pipeline.layout.stages)
            delay = run.pipeline.delay[0]
            event = StartEvent(self.directory.path, self.epochs, batches, stages, processes, delay, parameters)
            for callback in self.callbacks:
                callback.on_start(event)

    def begin_epoch(self, epoch: int) -> None:
        """From now on, losses and speed are this epoch's."""
        self.epoch, self.meter, self.speed = epoch, Meter(), Speed()
        self._recent, self._read_at = (None, 0.0), 0.0
        self.batches_done = epoch * len(self.run.train_loader)

    def saw(self, output: Output) -> None:
        """A tick of the pipeline in which a micro-batch was fed."""
        self.batches_done += 1
        if not self.directory:
            return
        recipe, pipeline = self.run.recipe, self.run.pipeline
        self.count(output)
        images_fed = recipe.batch_size * recipe.data_parallel
        speed = self.speed.add(images_fed)
        logged = pipeline.fed % (recipe.log_interval * recipe.accumulation_steps) == 0
        if logged or (self.reporter.live and time.perf_counter() - self._read_at > SHOWN_EVERY):
            self._recent, self._read_at = self.meter.recent(), time.perf_counter()
        loss, top1 = self._recent
        fill = f"{pipeline.in_flight}/{2 * len(pipeline.layout.stages) - 1}"
        total = self.epochs * len(self.run.train_loader)
        self.reporter.batch(self.epoch, self.batches_done, total, images_fed, loss, top1, speed, fill)
        if loss is not None and logged:
            updates = pipeline.fed // recipe.accumulation_steps
            event = LogEvent(self.epoch, updates, pipeline.tick, loss, top1, self.learning_rate(), speed)
            self.directory.log(event="train", **asdict(event))
            for callback in self.callbacks:
                callback.on_log(event)

    def count(self, output: Output) -> None:
        """Compares what came out with its labels."""
        if output.loss is None or output.logits is None or output.labels is None:
            return
        distillation = self.run.distillation
        labels = output.labels if distillation is None else distillation.own(output.labels)
        hard = labels.argmax(1) if labels.ndim == 2 else labels
        self.meter.add(output.loss, (output.logits.argmax(1) == hard).sum(), len(hard))

    def validated(self, scores: Scores, whole: Classifier, seconds: float, ended: bool = True) -> None:
        """Saves a model that was validated.

        Args:
            scores: on the validation split.
            whole: the model, on the CPU.
            seconds: that the validation took.
            ended: whether an epoch has; else training was interrupted.

        Raises:
            Failure: the model or its loss is not finite; it is not saved.
        """
        assert self.directory is not None
        train_loss, lr = self.meter.mean_loss(), self.learning_rate()
        event = ValidationEvent(
            self.epoch, train_loss, scores.loss, scores.top1, scores.top5, lr, self.training_seconds
        )
        if ended:
            self.directory.log(
                event="validation",
                epoch=self.epoch,
                top1=scores.top1,
                top5=scores.top5,
                loss=scores.loss,
                seconds=seconds,
            )
        if not math.isfinite(scores.loss):
            kept = self.directory.what_is_kept()
            raise Failure(f"the validation loss is {scores.loss}: the model is not saved, {kept}: {ADVICE}")
        self.directory.save_model(whole, self.run.preprocessing, self.run.data.class_names)
        if ended:
            self.directory.summarize(
                {
                    "epoch": self.epoch,
                    "train_loss": train_loss,
                    "eval_loss": scores.loss,
                    "eval_top1": scores.top1,
                    "eval_top5": scores.top5,
                    "lr": lr,
                }
            )
            self.reporter.epoch(event)
            for callback in self.callbacks:
                callback.on_validation(event)

    def complete(self, scores: Scores) -> Path:
        """Completes the run directory of a model that was saved; gives it."""
        assert self.directory is not None
        path, wall = self.directory.path, time.perf_counter() - self.started
        seconds = {"wall_seconds": wall, "training_seconds": self.training_seconds}
        record_run(path, self.run.recipe, scores, self.run.world.size, **seconds)
        return path

    def end(self, scores: Scores, interrupted: bool) -> None:
        """Says that the run is over."""
        if self.directory:
            path, seconds = self.directory.path, self.training_seconds
            event = EndEvent(path, scores.loss, scores.top1, scores.top5, seconds, interrupted)
            for callback in self.callbacks:
                callback.on_end(event)

    def learning_rate(self) -> float:
        """The schedule's; `layer_decay` scales it layer by layer."""
        return self._rate(self.run.pipeline.fed // self.run.recipe.accumulation_steps)

    def what_is_kept(self) -> str:
        """For messages about training that cannot go on."""
        return self.directory.what_is_kept() if self.directory else "what was saved before is kept"
