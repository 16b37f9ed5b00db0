"""The training loop: feed the pipeline, watch what comes out, validate, save."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from petra_zoo.device import computing
from petra_zoo.errors import Failure, UserError
from petra_zoo.evaluation.scores import Scores
from petra_zoo.files import check_free
from petra_zoo.petra import NotFiniteError, Output, World, first_not_finite, leave
from petra_zoo.petra.preparing import Images, fed_streams
from petra_zoo.settings.recipe import Recipe
from petra_zoo.settings.recipe_files import load_recipe, override_recipe
from petra_zoo.training.callbacks import Callback
from petra_zoo.training.observer import ADVICE, Observer
from petra_zoo.training.preparation import Prepared, prepare
from petra_zoo.training.progress import Reporter
from petra_zoo.training.ranks import enter, together
from petra_zoo.training.validation import validate


@dataclass(frozen=True)
class Result:
    """What a run left behind.

    Attributes:
        path: the run directory.
        evaluation: of the model saved there, on the validation split.
        training_seconds: time spent training, validation and saving apart.
        delay: D_0, how many updates old the first stage's gradients were.
        interrupted: whether the run was stopped before its last epoch.
        bad_images: how many training images could not be read and were skipped.
    """

    path: Path
    evaluation: Scores
    training_seconds: float
    delay: float
    interrupted: bool = False
    bad_images: int = 0


def train(
    recipe: Recipe | str | Path,
    overrides: Sequence[str] = (),
    *,
    name: str | None = None,
    callbacks: Sequence[Callback] = (),
    reporter: Reporter | None = None,
) -> Result:
    """Trains by a recipe, from data to a saved checkpoint, with the processes that were launched together.

    Args:
        recipe: an installed recipe's name, the path of a `.yaml` file, or a recipe.
        overrides: ``KEY=VALUE`` each, as on the command line.
        name: for the default run directory, ``runs/NAME-TIME``; default: the recipe's.
        callbacks: who is told of what happens, on the rank that sees the losses; see `Callback`.
        reporter: who tells the user; default: the console, on that rank. `Reporter(quiet=True)` says nothing.

    Raises:
        UserError: settings, data or disk do not allow it; what was saved before is still there. Every process raises
            it, whichever one found the mistake.
        Failure: training has diverged; likewise.

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
    world = enter(settings)
    try:
        together(world, lambda: _check_output(settings, world))  # before data is fetched and the model is measured
        with computing(world.device, deterministic=settings.deterministic, tf32=settings.tf32):
            prepared = prepare(settings, name=name, world=world)
            return Run(prepared, reporter or Reporter(quiet=not world.reports), callbacks).train()
    finally:
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
        self.pipeline, self.ema = prepared.pipeline, prepared.ema
        self.observer = Observer(prepared, reporter, callbacks)

    def train(self) -> Result:
        """Runs all epochs, drains the pipeline and saves the model after every validation."""
        observer, world = self.observer, self.world
        together(world, observer.open_directory)
        scores: Scores | None = None
        interrupted = False
        with self.reporter:
            observer.start()
            try:
                for epoch in range(observer.epochs):
                    observer.begin_epoch(epoch)
                    self.move_couplings(epoch)
                    self.run_epoch(epoch)
                    last = epoch == observer.epochs - 1
                    if last:
                        for output in self.drain():
                            observer.count(output)
                    if last or (epoch + 1) % self.recipe.val_interval == 0:
                        scores = validate(self.prepared, observer)
            except NotFiniteError as error:
                raise self.diverged(error) from error
            except KeyboardInterrupt:
                if not world.alone:  # ranks stop in different ticks: the last saved epoch is what there is
                    raise
                interrupted = True
                self.reporter.line("interrupted: saving the model as it is (weights only, the run cannot be continued)")
                scores = validate(self.prepared, observer, ended=False)
        bad_images = sum(world.gather(len(self.prepared.data.bad_images)))
        path, scores = world.from_reporter((observer.complete(scores) if scores else None, scores))
        assert path is not None
        assert scores is not None
        observer.end(scores, interrupted)
        delay = self.pipeline.delay[0]
        return Result(path, scores, observer.training_seconds, delay, interrupted, bad_images)

    def run_epoch(self, epoch: int) -> None:
        """Feeds one epoch; micro-batches in flight stay in flight."""
        loader = self.prepared.train_loader
        self.model.train()
        loader.set_epoch(epoch)
        with self.observer.training():
            for images, labels in self.prepared.ticks(loader):
                self.observer.saw(self.step(images, labels))

    def step(self, images: Images | None, labels: Tensor | None) -> Output:
        """One tick: the pipeline's, with the teacher's word where images are fed, and the moving average behind it."""
        if self.prepared.distillation and images is not None and labels is not None:
            labels = self.prepared.distillation.labels(self.prepared.transform(*fed_streams(images)), labels)
        output = self.pipeline.step(images, labels)
        if self.ema and self.pipeline.fed % self.recipe.accumulation_steps == 0:
            self.ema.update(self.model)
        return output

    def drain(self) -> list[Output]:
        """Lets the micro-batches in flight finish; gives what comes out."""
        with self.observer.training():
            outputs = self.pipeline.drain()
            if self.ema:
                self.ema.update(self.model)
        return outputs

    def move_couplings(self, epoch: int) -> None:
        """Sets an epoch's couplings, where they move: of the model and of its moving average."""
        schedule = self.prepared.schedule
        if schedule is None or not schedule.moves(epoch):
            return
        self.drain()  # nothing may be in flight
        schedule.apply(epoch, self.model, *([self.ema.module] if self.ema else []))

    def diverged(self, error: NotFiniteError) -> Failure:
        """What to tell when training cannot go on, where it is known: which tensor was hit, and what is on disk."""
        hit = first_not_finite(self.model)
        also = f", and so is {hit}" if hit else ""
        where = f"in epoch {self.observer.epoch + 1}, tick {self.pipeline.tick}"
        kept = self.observer.what_is_kept()
        return Failure(f"training stopped {where}: {error}{also}; no model is saved, {kept}: {ADVICE}")


def _check_output(recipe: Recipe, world: World) -> None:
    if recipe.output and world.reports:
        check_free(recipe.output, "output=DIR")
