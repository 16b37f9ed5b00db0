"""The training loop: feed the pipeline, watch what comes out, validate, save."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from torch import Tensor

from petra_zoo.device import computing
from petra_zoo.errors import Failure, UserError
from petra_zoo.evaluation.scores import Scores
from petra_zoo.petra import LinkError, NotFiniteError, Output, first_not_finite, leave
from petra_zoo.petra.drift import DriftGuard
from petra_zoo.petra.preparing import Images, fed_streams
from petra_zoo.petra.world import abort
from petra_zoo.settings.recipe import Recipe
from petra_zoo.settings.recipe_files import load_recipe, override_recipe
from petra_zoo.training.callbacks import Callback
from petra_zoo.training.endings import what_to_lower
from petra_zoo.training.log_writers import require_log_writers
from petra_zoo.training.observer import ADVICE, Observer
from petra_zoo.training.preparation import Prepared, prepare
from petra_zoo.training.progress import Reporter
from petra_zoo.training.ranks import SharedFailure, enter, require_shared, together
from petra_zoo.training.resuming import (
    Start,
    adopt,
    find_start,
    finished_result,
    forget_launch,
    remember_launch,
)
from petra_zoo.training.resuming import with_the_launchs_directory as fixed
from petra_zoo.training.run_lock import held_by_this_run
from petra_zoo.training.saving import Place, Saver
from petra_zoo.training.stopping import Agreement, Deadline, RunStopped, Told, Word, listening
from petra_zoo.training.threads import threads_restored
from petra_zoo.training.validation import validate

SHOWN_IMAGES = 8  # of a micro-batch, in an error


@dataclass(frozen=True)
class Result:
    """What a run left behind.

    Attributes:
        path: the run directory.
        evaluation: of the model saved there, on the validation split.
        training_seconds: time spent training, validation and saving apart.
        delay: D_0, how many updates old the first stage's gradients were.
        finished_before: whether there was nothing left to do.
        bad_images: how many training images could not be read and were skipped.
        skipped: how many micro-batches were left out, for they were not finite.
        ended: why the run ended: `all 20 epochs`, `max_updates=...` or `patience=...`, with what was waited for.
    """

    path: Path
    evaluation: Scores
    training_seconds: float
    delay: float
    finished_before: bool = False
    bad_images: int = 0
    skipped: int = 0
    ended: str = ""


def train(
    recipe: Recipe | str | Path,
    overrides: Sequence[str] = (),
    *,
    name: str | None = None,
    callbacks: Sequence[Callback] = (),
    reporter: Reporter | None = None,
    resume: str = "auto",
    allow_change: Sequence[str] = (),
    max_seconds: float | None = None,
) -> Result:
    """Trains by a recipe, from data to a saved checkpoint, with the processes that were launched together.

    A first SIGTERM, SIGINT or SIGUSR1 ends the run behind a tick, saved (in the main thread, which alone hears them).

    Args:
        recipe: an installed recipe's name, the path of a `.yaml` file, or a recipe.
        overrides: ``KEY=VALUE`` each, as on the command line.
        name: for the default run directory, ``runs/NAME-TIME``; default: the recipe's.
        callbacks: who is told of what happens, on the rank that sees the losses; see `Callback`.
        reporter: who tells the user; default: the console, on that rank. `Reporter(quiet=True)` says nothing.
        resume: `auto`: the run in `output` goes on where it was saved last; the path of a run or of one checkpoint, to
            go on from there; `never`: `output` must be absent or empty.
        allow_change: settings that may differ from those of the run that goes on.
        max_seconds: how long the run may take before it is saved and stopped.

    Raises:
        UserError: settings, data or disk do not allow it; what was saved before is still there. Every process raises
            it, whichever one found the mistake.
        Failure: training has diverged; likewise.
        RunStopped: by a signal or by `max_seconds`; called again, it goes on.

    Example:
        >>> result = train("digits/petra_revnet_tiny", ["epochs=2", "output=runs/first"])
        >>> result.evaluation.top1
    """
    if strangers := [x for x in callbacks if not isinstance(x, Callback)]:
        raise UserError(
            f"callbacks are objects whose class inherits from petra_zoo.training.Callback, not {strangers[0]!r}"
        )
    if isinstance(recipe, Recipe):
        settings, name = override_recipe(recipe, overrides), name or "run"
    else:
        settings, name = load_recipe(str(recipe), overrides), name or str(recipe)
    deadline = Deadline(max_seconds)
    with threads_restored(), listening() as told:
        world, lost = enter(settings), False
        try:
            settings = world.from_reporter(fixed(settings))
            together(world, lambda: require_log_writers(settings.log_to) if world.reports else None)
            # Before data is fetched and the model is measured.
            start = together(world, lambda: find_start(settings, resume, allow_change) if world.reports else None)
            start = world.from_reporter(start) or Start()
            if start.finished and start.directory:
                scores, seconds, ended = finished_result(start.directory)
                return Result(start.directory, scores, seconds, settings.delay[0], finished_before=True, ended=ended)
            adopt(start)
            partition = start.checkpoint.manifest.stages if start.checkpoint else None
            with computing(world.device, deterministic=settings.deterministic, tf32=settings.tf32):
                prepared = prepare(settings, name=name, world=world, partition=partition)
                run = Run(prepared, reporter or Reporter(quiet=not world.reports), callbacks)
                return run.train(start, told, deadline)
        except LinkError:
            lost = True
            abort()
            raise
        finally:
            if not lost:  # leaving would wait for what will never come
                leave()


class Run:
    """One run in progress.

    Every rank has one and calls the same methods: the one that owns the stem feeds, the one that owns the head sees
    what comes out and has the run directory.

    Args:
        prepared: what runs.
        reporter: who tells the user.
        callbacks: who else is told.
    """

    def __init__(self, prepared: Prepared, reporter: Reporter, callbacks: Sequence[Callback] = ()) -> None:
        self.prepared, self.reporter = prepared, reporter
        self.recipe, self.world, self.model = prepared.recipe, prepared.world, prepared.model
        self.pipeline, self.ema, self.length = prepared.pipeline, prepared.ema, prepared.length
        self.finite = self.pipeline.settings.finite
        # In one of several processes an error in the middle of a tick would leave the others waiting.
        self.finite.raises = self.world.alone
        self.skipped = 0
        self.fed_elsewhere = 0  # micro-batches fed so far, less those of epochs as they are now
        every, limit = self.recipe.drift_every, self.recipe.drift_limit
        self.guard = DriftGuard(self.pipeline.stages, every, limit) if every else None
        self.observer = Observer(prepared, reporter, callbacks)
        self.agreement = Agreement(self.pipeline.world)

    def train(self, start: Start | None = None, told: Told | None = None, deadline: Deadline | None = None) -> Result:
        """Runs all epochs, or as long as patience lasts, and saves the model after every validation.

        Args:
            start: what it goes on from; default: from nothing.
            told: whether it was told to stop.
            deadline: of the run.

        Raises:
            RunStopped: it was told to, or its time is over; it is saved.
        """
        observer, world, start = self.observer, self.world, start or Start()
        self.told, self.deadline = told or Told(), deadline or Deadline(None)
        together(world, lambda: observer.open_directory(start.directory))
        path = world.from_reporter(observer.directory.path if observer.directory else None)
        assert path is not None
        if self.recipe.checkpoint_every is not None:
            require_shared(path, world)
        with held_by_this_run(path) if world.reports else nullcontext():
            self.saver = Saver(self.prepared, observer, path)
            if world.reports:
                remember_launch(path)
            with self.reporter, closing(observer):
                at = self.begin_at(start)
                self.world = self.agreement.world
                self.prepared = self.saver.run = replace(self.prepared, world=self.world)
                ended = self.run_epochs(at)
                observer.tell_why(ended)
        bad_images = sum(self.world.gather(len(self.prepared.data.bad_images)))
        scores = self.world.from_reporter(observer.best)
        assert scores is not None
        observer.end(scores)
        if world.reports:
            forget_launch(path)
        delay = self.pipeline.delay[0]
        skipped = max(self.world.gather(self.pipeline.skipped))
        return Result(path, scores, observer.training_seconds, delay, False, bad_images, skipped, ended)

    def begin_at(self, start: Start) -> Place:
        """Says what is about to run; of a run that goes on, takes back all that was saved."""
        at, observer = Place(), self.observer
        if checkpoint := start.checkpoint:
            here, at, finished = start.directory is not None, Place.of(checkpoint), checkpoint.manifest.finished
            if self.length.is_over(at.epoch, at.batch, finished=finished):
                raise UserError(f"{checkpoint.path} has trained {at}, which is all that there are to train")
            logs = together(self.world, lambda: self.saver.load(start))
            self.fed_elsewhere = self.pipeline.fed - (at.epoch * len(self.prepared.train_loader) + at.batch)
            if over := self.world.from_reporter(observer.patience.over) if finished else None:
                raise UserError(f"{checkpoint.path} has ended by {over}: there is nothing more to train with it")
            if here:
                together(self.world, lambda: self.saver.set_aside_behind(checkpoint))
            together(self.world, lambda: observer.take_over(logs))
            self.reporter.line(f"goes on from {checkpoint.path}: epoch {at.epoch + 1}, micro-batch {at.batch}")
        else:
            together(self.world, observer.take_over)
        observer.start()
        return at

    def run_epochs(self, at: Place) -> str:
        """Runs what is left of all epochs; gives why it ended."""
        self.told.saves = True
        ended = None
        try:
            while ended is None:
                ended = self.run_epoch(at)
                at = Place(at.epoch + 1)
        except NotFiniteError as error:
            raise self.not_finite(error) from error
        return ended

    def run_epoch(self, at: Place) -> str | None:
        """Feeds what is left of an epoch, validates and saves; micro-batches in flight stay in flight.

        They do where patience ends here, too: what is saved is what was validated, and with more patience it goes on.

        Returns:
            Why the run ends here, if it does.
        """
        observer, epoch = self.observer, at.epoch
        observer.begin_epoch(epoch, at.batch)
        if at.batch == 0:
            self.move_couplings(epoch)
        self.feed(at)
        last, scores = epoch == self.length.epochs - 1, None
        ended = self.length.ended if last else None
        if last:
            for output in self.drain():
                observer.count(output)
        if last or (epoch + 1) % self.recipe.val_interval == 0:
            scores = validate(self.prepared, observer)
            if self.recipe.patience and not last:
                ended = self.world.from_reporter(observer.patience.over)
        if ended:
            observer.complete(ended)  # before the checkpoint that says so
        if self.saver.due_after_epoch(epoch) or (ended and self.saver.every):
            self.save(Place(*self.length.place_after(epoch)), scores, finished=ended is not None)
        return ended

    def feed(self, at: Place) -> None:
        """Feeds an epoch from a micro-batch on; saves where it is time to, and where it is time to stop."""
        loader, batch = self.prepared.train_loader, at.batch
        self.model.train()
        loader.set_epoch(at.epoch)
        with self.observer.training():
            ticks = self.pipeline.links.awaited(self.prepared.ticks(loader, batch))
            for images, labels in islice(ticks, self.length.fed_in(at.epoch) - batch):
                self.observer.saw(self.step(images, labels))
                batch += 1
                self.look_up(Place(at.epoch, batch))
        self.meet()

    def look_up(self, at: Place) -> None:
        """Between two ticks: saves where it is time to; stops, where any process was told to.

        Raises:
            RunStopped: it is saved.
        """
        told, late = self.told, self.world.reports and self.deadline.passed
        failed = self.finite.told is not None or self.observer.divergence.found is not None
        own = Word(told.by is not None or late, self.saver.due_by_clock(), failed, self.skips())
        word = self.agreement.exchange(own)
        self.observer.left_out(word.skipped)
        if word.failed or word.stop or word.save or self.saver.due_after_tick():
            word = word.or_said(self.meet())
            self.save(at)
        if word.stop:
            whys = self.world.gather(told.by or ("--max-time" if late else None))
            raise RunStopped(next((why for why in whys if why), "a signal"), self.saver.path)

    def skips(self) -> int:
        """Micro-batches that this process has left out so far, as far as it knows without waiting for a GPU."""
        logged = self.pipeline.fed % (self.recipe.log_interval * self.recipe.accumulation_steps) == 0
        if self.finite.skips and (logged or not self.finite.waits(self.world.device)):
            self.skipped = self.pipeline.skipped
        return self.skipped

    def meet(self) -> Word:
        """All processes behind the same tick: gives what was said and not heard yet.

        Raises:
            Failure: something was not finite, or the loss runs away, in any of them; all of them raise it.
        """
        word = self.agreement.settle()
        if not self.world.alone:  # else it is raised where it is found
            self.finite.settle()
        found = [x for x in self.world.gather(self.failure()) if x]
        if found:
            raise SharedFailure(min(found)[1])
        return word

    def failure(self) -> tuple[int, str] | None:
        """Why training cannot go on, if this process knows it, and since which micro-batch."""
        if told := self.finite.told:
            return told.fed.start, str(self.not_finite(told))
        if why := self.observer.diverged():
            return (
                self.pipeline.fed,
                f"{self.stopped_where()}: {why}; {self.what_is_kept()}: {what_to_lower(self.recipe)}",
            )
        return None

    def save(self, at: Place, scores: Scores | None = None, *, finished: bool = False) -> None:
        """Saves, and does not count it as training."""
        scores = self.world.from_reporter(scores)
        metrics = {"loss": scores.loss, "top1": scores.top1, "top5": scores.top5} if scores else None
        with self.observer.pausing():
            self.saver.save(at, metrics, finished=finished)

    def step(self, images: Images | None, labels: Tensor | None) -> Output:
        """One tick: the pipeline's, with the teacher's word where images are fed, and the moving average behind it."""
        if self.prepared.distillation and images is not None and labels is not None:
            labels = self.prepared.distillation.labels(self.prepared.transform(*fed_streams(images)), labels)
        if self.guard:
            self.guard.feed(self.pipeline.fed)
        output = self.pipeline.step(images, labels)
        if self.ema and self.pipeline.fed % self.recipe.accumulation_steps == 0:
            self.ema.update(self.model)
        return output

    def drain(self) -> list[Output]:
        """Lets the micro-batches in flight finish; gives what comes out."""
        with self.observer.training():
            updates = self.pipeline.in_flight > 0 or self.pipeline.fed % self.recipe.accumulation_steps > 0
            outputs = self.pipeline.drain()
            if self.ema and updates:
                self.ema.update(self.model)
        self.meet()
        return outputs

    def move_couplings(self, epoch: int) -> None:
        """Sets an epoch's couplings, where they move: of the model and of its moving average."""
        schedule = self.prepared.schedule
        if schedule is None or not schedule.moves(epoch):
            return
        self.drain()  # nothing may be in flight
        schedule.apply(epoch, self.model, *([self.ema.module] if self.ema else []))

    def not_finite(self, error: NotFiniteError) -> Failure:
        """What to tell when training cannot go on, where it is known: which tensor was hit, and what is on disk."""
        hit = first_not_finite(self.model)
        also = f", and so is {hit}" if hit else ""
        found = f"{error}{self.place_of(error.fed)}{also}"
        return Failure(f"{self.stopped_where()}: {found}; {self.what_is_kept()}: {ADVICE}")

    def stopped_where(self) -> str:
        """The beginning of what is told of a run that cannot go on."""
        return f"training stopped in epoch {self.observer.epoch + 1}, tick {self.pipeline.tick}"

    def what_is_kept(self) -> str:
        """For the same, behind its cause."""
        return f"no model is saved, {self.observer.what_is_kept()}, {self.saver.kept()}"

    def place_of(self, fed: range) -> str:
        """Where micro-batches are in the data, in words."""
        loader = self.prepared.train_loader
        if not fed or fed.start < max(0, self.fed_elsewhere):
            return ""
        (epoch, first), (_, last) = (divmod(n - self.fed_elsewhere, len(loader)) for n in (fed[0], fed[-1]))
        if first != last:
            return f" (micro-batches {first + 1} to {last + 1} of epoch {epoch + 1})"
        images = loader.images_of(epoch, first)
        shown = ", ".join(map(str, images[:SHOWN_IMAGES])) + (", ..." if len(images) > SHOWN_IMAGES else "")
        return f" (micro-batch {first + 1} of epoch {epoch + 1}, training images {shown})"
