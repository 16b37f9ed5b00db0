"""What becomes of a run's numbers: a run directory, a console, and whoever wants to be called back."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from petra_zoo.checkpoints.load import LAST
from petra_zoo.errors import Failure
from petra_zoo.evaluation.scores import Scores
from petra_zoo.models.classifier import Classifier
from petra_zoo.petra import Output
from petra_zoo.petra.optimization import State
from petra_zoo.strict_json import Json
from petra_zoo.training.callbacks import Callback, EndEvent, LogEvent, StartEvent, ValidationEvent
from petra_zoo.training.endings import Divergence, Patience, is_better
from petra_zoo.training.finetuning import start_lines
from petra_zoo.training.log_writers import LogWriter, open_log_writers
from petra_zoo.training.meter import Meter, Speed
from petra_zoo.training.optimization import learning_rates
from petra_zoo.training.preparation import Prepared
from petra_zoo.training.progress import Reporter
from petra_zoo.training.run_directory import PROFILE, RunDirectory, record_run
from petra_zoo.training.runs import read_log
from petra_zoo.wording import counted

SHOWN_EVERY = 1.0  # seconds between two readings for a person to see: each waits for the device
ADVICE = "lower the learning rate, set clip_grad, look for bad images, or leave such out with on_nonfinite=skip"


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
        self.length = run.length
        self.patience = Patience(run.recipe)
        self.divergence = Divergence(run.recipe, run.model.num_classes)
        self.epoch, self.batches_done = 0, 0
        self.meter, self.speed = Meter(), Speed()
        self._recent: tuple[float | None, float] = (None, 0.0)  # loss and accuracy as they were last read
        self._read_at = 0.0
        self.directory: RunDirectory | None = None
        self._rate = learning_rates(run.recipe, len(run.train_loader))
        self.best: Scores | None = None  # of the run's model
        self.best_model: str | None = None  # its SHA-256
        self._in_training = False
        self.skipped = 0
        self.writers: list[LogWriter] = []

    def open_directory(self, again: Path | None = None) -> None:
        """Makes the run directory, or takes that of a run that goes on.

        Raises:
            UserError: it holds anything, or cannot be written.
        """
        if self.run.world.reports:
            recipe = self.run.recipe
            self.directory = RunDirectory.of(again, recipe) if again else RunDirectory(recipe, self.run.name)

    def take_over(self, logs: Mapping[str, int] | None = None) -> None:
        """From here on the run directory is this run's, whose settings and data were found to be right.

        Args:
            logs: bytes of the logs that a run which goes on has written so far; what came later comes again.

        Raises:
            UserError: it cannot be written.
        """
        if not self.directory:
            return
        self.directory.save_recipe(self.run.recipe)
        if self.run.profile:
            self.run.profile.save(self.directory.path / PROFILE)
        if logs is not None:
            self.directory.cut_logs(logs)
        metric = self.run.recipe.checkpoint_metric
        if metric and self.best is not None and self.directory.model_sha256() != self.best_model:
            aside = self.directory.set_model_aside()
            self.reporter.line(f"set aside, it was saved behind what the run goes on from: {aside}")
            self.best = self.best_model = None
        if metric is None and (name := self.directory.set_last_aside()):
            self.reporter.line(f"set aside, for the run's model is its last one now: {name}")

    def _log(self, **line: Json) -> None:
        """A line of metrics.jsonl, and wherever else it is shown."""
        assert self.directory is not None
        self.directory.log(**line)
        for writer in self.writers:
            writer.write(line)

    def close(self) -> None:
        """There is nothing more to be seen, whether the run is over or not."""
        for writer in self.writers:
            writer.close()
        self.writers = []

    def state(self) -> State:
        """What a continuation needs to say, and to log, what it would have."""
        assert self.directory is not None
        return {
            "meter": self.meter.state(),
            "training_seconds": self.training_seconds,
            "wall_seconds": time.perf_counter() - self.started,
            "logs": self.directory.log_sizes(),
            "skipped": self.skipped,
            "best": None if self.best is None else vars(self.best),
            "best_model": self.best_model,
            "patience": self.patience.state(),
            "divergence": self.divergence.state(),
        }

    def continue_from(self, state: State, *, same_directory: bool, another_loss: bool = False) -> None:
        """Restores what `state` gave; of another loss than today's, no losses."""
        if not another_loss:
            self.meter.load(state["meter"])
        self.training_seconds = state["training_seconds"]
        self.skipped = state.get("skipped", 0)
        self.started = time.perf_counter() - state["wall_seconds"]
        if "patience" in state:  # not in checkpoints of earlier versions
            self.patience.load(state["patience"])
            if not another_loss:
                self.divergence.load(state["divergence"])
        if same_directory:  # else the run's model is not in here
            self.best = None if state["best"] is None else Scores(**state["best"])
            self.best_model = state.get("best_model")

    @contextmanager
    def training(self) -> Iterator[None]:
        """What is done in here counts as training."""
        started, self._in_training = time.perf_counter(), True
        try:
            yield
        finally:
            self._in_training = False
            self.training_seconds += time.perf_counter() - started

    @contextmanager
    def pausing(self) -> Iterator[None]:
        """What is done in here, inside training, does not count as it."""
        started = time.perf_counter()
        yield
        self.training_seconds -= (time.perf_counter() - started) if self._in_training else 0.0

    def start(self) -> None:
        """Says what is about to run."""
        run, batches = self.run, len(self.run.train_loader)
        self.reporter.start(run.recipe, run.pipeline, batches, self.length.epochs)
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
            event = StartEvent(self.directory.path, self.length.epochs, batches, stages, processes, delay, parameters)
            for callback in self.callbacks:
                callback.on_start(event)
            self._open_writers(self.directory)

    def _open_writers(self, directory: RunDirectory) -> None:
        recipe = self.run.recipe
        lines = list(read_log(directory.path)) if recipe.log_to else []
        for writer in open_log_writers(recipe.log_to, directory.path, recipe.model_dump(mode="json")):
            writer.begin(lines)
            self.writers.append(writer)

    def begin_epoch(self, epoch: int, batch: int = 0) -> None:
        """From now on, losses and speed are this epoch's; of one that goes on, the losses are there already."""
        if batch == 0 and self.epoch == 0 and epoch > 0 and self.divergence.start is None:  # an epoch without a reading
            self.divergence.start = self.meter.first(self.run.recipe.accumulation_steps)
        self.epoch, self.speed = epoch, Speed()
        if batch == 0:
            self.meter = Meter()
        self._recent, self._read_at = (None, 0.0), 0.0
        self.batches_done = epoch * len(self.run.train_loader) + batch

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
        self.reporter.batch(self.epoch, self.batches_done, self.length.total, images_fed, loss, top1, speed, fill)
        if loss is not None and logged:
            event = LogEvent(self.epoch + 1, pipeline.windows, pipeline.tick, loss, top1, self.learning_rate(), speed)
            self._look_for_divergence(loss)
            self._log(event="train", **asdict(event))
            for callback in self.callbacks:
                callback.on_log(event)

    def _look_for_divergence(self, loss: float) -> None:
        """At a reading of the log: for what has come out, nobody waits for the device another time."""
        if self.divergence.start is None:
            self.divergence.start = self.meter.first(self.run.recipe.accumulation_steps)
        self.divergence.saw(loss)

    def left_out(self, micro_batches: int) -> None:
        """So many micro-batches have been left out so far, for they were not finite."""
        if micro_batches > self.skipped and self.directory:
            self._log(event="skipped", epoch=self.epoch + 1, tick=self.run.pipeline.tick, micro_batches=micro_batches)
            self.reporter.line(f"left out so far, for they were not finite: {counted(micro_batches, 'micro-batch')}")
        self.skipped = max(self.skipped, micro_batches)

    def count(self, output: Output) -> None:
        """Compares what came out with its labels."""
        if output.loss is None or output.logits is None or output.labels is None:
            return
        distillation = self.run.distillation
        labels = output.labels if distillation is None else distillation.own(output.labels)
        hard = labels.argmax(1) if labels.ndim == 2 else labels
        self.meter.add(output.loss, (output.logits.argmax(1) == hard).sum(), len(hard))

    def validated(self, scores: Scores, whole: Classifier, seconds: float) -> None:
        """Saves a model that was validated.

        Args:
            scores: on the validation split.
            whole: the model, on the CPU.
            seconds: that the validation took.

        Raises:
            Failure: the model or its loss is not finite; it is not saved.
        """
        assert self.directory is not None
        train_loss, lr = self.meter.mean_loss(), self.learning_rate()
        event = ValidationEvent(
            self.epoch + 1, train_loss, scores.loss, scores.top1, scores.top5, lr, self.training_seconds
        )
        self._log(
            event="validation",
            epoch=self.epoch + 1,
            update=self.run.pipeline.windows,
            top1=scores.top1,
            top5=scores.top5,
            loss=scores.loss,
            seconds=seconds,
        )
        if not math.isfinite(scores.loss):
            kept = self.directory.what_is_kept()
            raise Failure(f"the validation loss is {scores.loss}: the model is not saved, {kept}: {ADVICE}")
        self.patience.saw(scores)
        self._save_model(scores, whole)
        self.directory.summarize(
            {
                "epoch": self.epoch + 1,
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

    def _save_model(self, scores: Scores, whole: Classifier) -> None:
        """As the run's, where it is the best or nobody asks for that; as its last, where these may be two."""
        assert self.directory is not None
        preprocessing, names = self.run.preprocessing, self.run.data.class_names
        metric = self.run.recipe.checkpoint_metric
        if metric is not None:
            self.directory.save_model(whole, preprocessing, names, LAST)
            self.directory.save_recipe(self.run.recipe, LAST)
        if metric is None or self.best is None or is_better(scores, getattr(self.best, metric), metric):
            self.directory.save_model(whole, preprocessing, names)
            self.best, self.best_model = scores, self.directory.model_sha256()

    def complete(self, ended: str) -> None:
        """Completes the run directory of a model that was saved.

        Args:
            ended: why the run ends here.
        """
        if not self.directory:
            return
        assert self.best is not None
        path, wall = self.directory.path, time.perf_counter() - self.started
        seconds = {"wall_seconds": wall, "training_seconds": self.training_seconds}
        record_run(path, self.run.recipe, self.best, self.run.world.size, ended=ended, **seconds)

    def tell_why(self, ended: str) -> None:
        """Says and logs why the run ends, where it is not for its epochs."""
        if self.directory and (self.run.recipe.epochs is None or ended != self.length.ended):
            self._log(event="end", epoch=self.epoch + 1, tick=self.run.pipeline.tick, why=ended)
            self.reporter.line(f"ended: {ended}")

    def end(self, scores: Scores) -> None:
        """Says that the run is over."""
        if self.directory:
            path, seconds = self.directory.path, self.training_seconds
            event = EndEvent(path, scores.loss, scores.top1, scores.top5, seconds)
            for callback in self.callbacks:
                callback.on_end(event)

    def learning_rate(self) -> float:
        """The schedule's; `layer_decay` scales it layer by layer."""
        return self._rate(self.run.pipeline.windows)

    def diverged(self) -> str | None:
        """What is wrong with the loss, in words; None where nothing is. Logs it."""
        found = self.divergence.found
        if found and self.directory:
            self._log(event="diverged", epoch=self.epoch + 1, tick=self.run.pipeline.tick, why=found)
        return found

    def what_is_kept(self) -> str:
        """For messages about training that cannot go on."""
        return self.directory.what_is_kept() if self.directory else "what was saved before is kept"
