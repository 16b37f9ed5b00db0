"""Saving a run, and taking it back: each process its own stages, one of them publishes.

A save reads and copies, and changes nothing: with it and without it a run computes the same bits.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self, TypeVar

import torch

from petra_zoo.checkpoints.manifest import FileEntry, Manifest, verify_file
from petra_zoo.checkpoints.packing import CheckpointError, from_safetensors, to_safetensors
from petra_zoo.checkpoints.pipeline_files import Averages, from_files, to_files
from petra_zoo.checkpoints.store import CHECKPOINTS, RunCheckpoint, Store
from petra_zoo.data.image_dataset import BadImage
from petra_zoo.errors import UserError
from petra_zoo.machine import describe_versions, now
from petra_zoo.petra.pipeline_state import load_tensors, not_finite_in, shared_tensors, stage_tensors, stages_to_read
from petra_zoo.reversible import UnitModel
from petra_zoo.settings.types import SaveInterval
from petra_zoo.strict_json import JsonObject
from petra_zoo.training.observer import Observer
from petra_zoo.training.preparation import Prepared
from petra_zoo.training.ranks import SharedFailure, together
from petra_zoo.training.renewing import MadeWith
from petra_zoo.training.resuming import LOSS, Start, check_middle
from petra_zoo.wording import counted

T = TypeVar("T")
RUN = "run.safetensors"  # what only the process that reports knows: losses so far, lengths of the logs


@dataclass(frozen=True)
class Place:
    """Where a run is: so many micro-batches of an epoch are fed; epochs count from 0."""

    epoch: int = 0
    batch: int = 0

    @classmethod
    def of(cls, checkpoint: RunCheckpoint) -> Self:
        """Where a run was when it was saved."""
        return cls(checkpoint.manifest.epoch, checkpoint.manifest.batch)

    def __str__(self) -> str:
        behind = f" and {counted(self.batch, 'micro-batch')}" if self.batch else ""
        return f"{counted(self.epoch, 'epoch')}{behind}"


class Saver:
    """Saves a run and takes it back. Every process has one and calls the same methods behind the same ticks.

    Args:
        run: what runs.
        observer: of it.
        path: the run directory, as this process sees it.
    """

    def __init__(self, run: Prepared, observer: Observer, path: Path) -> None:
        self.run, self.observer, self.path = run, observer, path
        self.every: SaveInterval | None = run.recipe.checkpoint_every
        self.saved_at = time.monotonic()

    def due_after_tick(self) -> bool:
        """Whether it is time to save behind this tick, which all processes know alike."""
        every = self.every
        return every is not None and every.unit == "ticks" and self.run.pipeline.fed % int(every.number) == 0

    def due_by_clock(self) -> bool:
        """Whether it is time to save, which only a clock knows."""
        every = self.every
        minutes = (time.monotonic() - self.saved_at) / 60
        return every is not None and every.unit == "minutes" and minutes >= every.number

    def due_after_epoch(self, epoch: int) -> bool:
        """Whether it is time to save behind an epoch, counted from 0."""
        every = self.every
        return every is not None and every.unit == "epochs" and (epoch + 1) % int(every.number) == 0

    def save(self, place: Place, metrics: Mapping[str, float] | None = None, *, finished: bool = False) -> None:
        """Saves everything; removes what is not to be kept any longer.

        Args:
            place: where the run is.
            metrics: of the validation at this place.
            finished: whether nothing is left to train.

        Raises:
            UserError: the disk is full or not writable; the checkpoints from before are untouched.
            Failure: something of it is not finite; likewise.
        """
        run, world = self.run, self.run.world
        run.pipeline.settings.finite.settle()
        tick = run.pipeline.tick
        store = Store(self.path / CHECKPOINTS)
        images = [asdict(image) for image in run.data.bad_images.values()] if world.first else None
        skips = run.recipe.on_nonfinite == "skip"  # then what is on its way will be left out
        wrong = not_finite_in(run.pipeline.state_dict(), in_flight=not skips)
        told = world.gather((images, wrong))
        if found := [wrong for _, wrong in told if wrong]:
            raise SharedFailure(f"{found[0]} is not finite behind tick {tick}, which is not saved: {self.kept()}")
        bad = [images for images, _ in told if images is not None]  # by replica
        self._settled(lambda: store.begin(tick) if world.reports else None)
        try:
            files = self._settled(lambda: self._write(store, tick, bad))
            entries = {name: entry for own in world.gather(files) for name, entry in own.items()}
            manifest = self._manifest(place, metrics, finished)
            self._settled(lambda: self._publish(store, manifest, entries) if world.reports else None)
        except UserError:
            if world.reports:
                store.give_up(tick)
            raise
        self.saved_at = time.monotonic()

    def set_aside_behind(self, checkpoint: RunCheckpoint) -> None:
        """Takes what this run has saved behind a checkpoint out of its way.

        Raises:
            UserError: it cannot be renamed.
        """
        if not self.run.world.reports:
            return
        try:
            for name in Store(self.path / CHECKPOINTS).set_aside_behind(checkpoint.path.name):
                self.observer.reporter.line(f"set aside, it was saved behind what the run goes on from: {name}")
        except OSError as error:
            raise UserError(f"cannot rename in {self.path / CHECKPOINTS}: {error.strerror or error}") from error

    def kept(self) -> str:
        """For messages about training that cannot go on."""
        names = Store(self.path / CHECKPOINTS).names()
        return f"the checkpoint {names[-1]} is kept" if names else "there is no checkpoint"

    def load(self, start: Start) -> Mapping[str, int]:
        """Takes a run back from a checkpoint, of the same partition; nothing on disk changes.

        Args:
            start: which; settings that have changed since are those of the recipe.

        Returns:
            Bytes that the logs had.

        Raises:
            UserError: a file is damaged, the state is another model's, or something has changed that cannot where the
                run was left.
        """
        checkpoint, same_directory = start.checkpoint, start.directory is not None
        assert checkpoint
        run, world, pipeline = self.run, self.run.world, self.run.pipeline
        own, senders = stages_to_read(pipeline.layout, world.rank)
        try:
            state, average = from_files(checkpoint, world.replica, own, senders)
            told = from_safetensors(verify_file(checkpoint.path, checkpoint.manifest, RUN))
        except CheckpointError as error:
            raise UserError(f"cannot go on: {error}") from error
        at, batches = Place.of(checkpoint), len(run.train_loader)
        then, images = told.get("batches", batches), told.get("images", len(run.data))  # earlier versions have none
        if at.batch and (then != batches or images != len(run.data)):
            raise UserError(
                f"{checkpoint.path} is {at.batch} micro-batches into an epoch of {counted(images, 'image')} in "
                f"{counted(then, 'micro-batch')}, and now there are {counted(len(run.data), 'image')} in "
                f"{counted(batches, 'micro-batch')}: take that back, or --resume a checkpoint from an epoch's end"
            )
        clock = copy.copy(pipeline.clock)
        clock.tick, clock.fed = state["tick"], dict(state["feeds"])
        check_middle(start, run.recipe, in_flight=clock.in_flight, in_epoch=at.batch > 0)
        made_with = MadeWith(pipeline)
        pipeline.load_state_dict(state, images=run.recipe.batch_size)
        if start.changed or then != batches:
            made_with.renew((at.epoch * batches + at.batch) // run.recipe.accumulation_steps)
        if run.ema:
            module = run.ema.module
            averaged = average or _averages(run.model, run)  # of a run that has had none: it begins where its model is
            load_tensors(shared_tensors(module), averaged.shared)
            for j in own:
                load_tensors(stage_tensors(module, pipeline.layout, j), averaged.stages[j])
        if world.first:
            run.data.note_bad([BadImage(**image) for image in told["bad_images"][world.replica]])
        if world.reports:
            another_loss = not LOSS.isdisjoint(start.changed)
            self.observer.continue_from(told["observer"], same_directory=same_directory, another_loss=another_loss)
        if images != len(run.data):
            now = counted(len(run.data), "training image")
            self.observer.reporter.line(f"warning: there are {now}, and were {images} when it was saved")
        logs: Mapping[str, int] = told["observer"]["logs"]
        return logs if same_directory else {}

    def _write(self, store: Store, tick: int, bad_images: Sequence[Sequence[JsonObject]]) -> dict[str, FileEntry]:
        """This process's own files."""
        run, world = self.run, self.run.world
        average = _averages(run.ema.module, run) if run.ema else None
        files = to_files(run.pipeline.state_dict(), average, world.replica, with_clock=world.last)
        if world.reports:
            data = {"batches": len(run.train_loader), "images": len(run.data)}
            files[RUN] = {"observer": self.observer.state(), "bad_images": bad_images, **data}
        return {name: store.write(tick, name, to_safetensors(state)) for name, state in files.items()}

    def _publish(self, store: Store, manifest: Manifest, entries: Mapping[str, FileEntry]) -> None:
        recipe = self.run.recipe
        saved = store.publish(manifest, entries)
        metric = recipe.checkpoint_metric or "top1"
        store.prune(recipe.keep_last, recipe.keep_best, metric, good=[saved.path.name])

    def _manifest(self, place: Place, metrics: Mapping[str, float] | None, finished: bool) -> Manifest:
        run = self.run
        return Manifest(
            tick=run.pipeline.tick,
            epoch=place.epoch,
            batch=place.batch,
            stages=tuple(run.pipeline.layout.sizes),
            replicas=run.world.replicas,
            threads=torch.get_num_threads(),
            recipe=run.recipe.model_dump(mode="json"),
            versions=describe_versions(),
            finished=finished,
            metrics=metrics,
            date=now(),
        )

    def _settled(self, step: Callable[[], T]) -> T:
        """A step that every process does; where it fails in one, it fails in all."""

        def attempt() -> T:
            try:
                return step()
            except TypeError as error:  # of somebody's own optimizer or schedule
                raise UserError(f"cannot save the run: {error}; checkpoint_every=null trains without") from error
            except OSError as error:
                reason = error.strerror or str(error)
                raise UserError(
                    f"cannot save to {self.path / CHECKPOINTS}: {reason}; the checkpoints from before are untouched"
                    + ("" if self.run.world.alone else " (every process must see the run directory: output=DIR)")
                ) from error

        return together(self.run.world, attempt)


def _averages(module: UnitModel, run: Prepared) -> Averages:
    layout = run.pipeline.layout
    own = [stage.index for stage in run.pipeline.stages]
    return Averages(shared_tensors(module), {j: stage_tensors(module, layout, j) for j in own})
