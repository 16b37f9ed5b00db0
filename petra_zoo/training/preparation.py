"""From a recipe to everything a run needs: the one place where its settings become objects.

`train` runs what comes out; `recipes validate` hands in small generated data and tries it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count, repeat

import torch
from timm.utils import ModelEmaV3

from petra_zoo.data.batch_transform import BatchTransform
from petra_zoo.data.feed import Batch, on_device
from petra_zoo.data.image_dataset import ImageDataset
from petra_zoo.data.loader import ImageLoader
from petra_zoo.data.preprocessing import Preprocessing
from petra_zoo.device import choose_device, require_compiler
from petra_zoo.models.classifier import Classifier, UnitClassifier
from petra_zoo.models.deferred import Deferred
from petra_zoo.petra import Pipeline, Profile, World
from petra_zoo.reversible import CompileOptions, compile_branches
from petra_zoo.settings.recipe import Recipe
from petra_zoo.training.build import (
    build_in_parts,
    build_loaders,
    build_model,
    check_batches,
    check_norms,
    check_units,
    memory_format,
    open_data,
    preprocessing_for,
)
from petra_zoo.training.coupling_schedule import CouplingSchedule, start_schedule
from petra_zoo.training.distillation import Distillation, build_distillation, load_teacher
from petra_zoo.training.engine import build_pipeline, profile_for_run, share_profile
from petra_zoo.training.length import Length, check_run_length
from petra_zoo.training.losses import build_loss
from petra_zoo.training.ranks import together
from petra_zoo.training.synchronized_norms import synchronize_statistics
from petra_zoo.training.threads import threads_for

LoadTeacher = Callable[[Recipe, torch.device], Classifier | None]
Splits = tuple[ImageDataset, ImageDataset]  # to train on, to validate on


@dataclass(frozen=True)
class Prepared:
    """A run that has not begun: every rank has one.

    Attributes:
        recipe: the settings.
        name: of the recipe, for the default run directory.
        world: this process's place.
        data: what is trained on.
        train_loader, val_loader: this replica's share of the training split, the whole validation split.
        model: the network; a rank of several keeps its own stages, and the rest on the meta device.
        preprocessing: of an image; it is saved with the model.
        transform: of a batch, on the device.
        profile: the measured costs that balanced the stages; None where operations were counted.
        pipeline: the model cut into stages, with its optimizers.
        ema: the moving average of the model.
        distillation: from a teacher.
        schedule: of the couplings.
    """

    recipe: Recipe
    name: str
    world: World
    data: ImageDataset
    train_loader: ImageLoader
    val_loader: ImageLoader
    model: UnitClassifier
    preprocessing: Preprocessing
    transform: BatchTransform
    profile: Profile | None
    pipeline: Pipeline
    ema: ModelEmaV3 | None
    distillation: Distillation | None
    schedule: CouplingSchedule | None

    @property
    def length(self) -> Length:
        """How long it will be."""
        return Length.of(self.recipe, len(self.train_loader))

    def batches(self, loader: ImageLoader, start: int = 0) -> Iterator[Batch]:
        """What a loader reads, on the device: images as bytes, which `transform` makes what the network takes."""
        return on_device(loader.read(start), self.world.device, memory_format(self.recipe))

    def endless(self) -> Iterator[Batch]:
        """What is trained on, epoch after epoch, on the rank that owns the stem."""
        for epoch in count():
            self.train_loader.set_epoch(epoch)
            yield from self.batches(self.train_loader)

    def ticks(self, loader: ImageLoader, start: int = 0) -> Iterable[Batch | tuple[None, None]]:
        """What each tick feeds from a batch on: it, on the rank that owns the stem; as often nothing on the others."""
        return self.batches(loader, start) if self.world.first else repeat((None, None), len(loader) - start)


def prepare(
    recipe: Recipe,
    *,
    name: str = "run",
    world: World | None = None,
    data: Splits | None = None,
    teacher_from: LoadTeacher = load_teacher,
    partition: Sequence[int] | None = None,
) -> Prepared:
    """Builds everything that a recipe asks for; writes nothing.

    Args:
        recipe: the settings.
        name: of the recipe, for the default run directory.
        world: this process among those that train together; default: alone.
        data: both splits, in the place of the recipe's.
        teacher_from: where a teacher comes from.
        partition: units per stage, of a run that goes on: costs are not measured again.

    Raises:
        UserError: settings, data or devices do not allow it. Every process raises it, whichever one found the mistake.
    """
    world = world or World(device=choose_device(recipe.device))
    cut = recipe if partition is None else recipe.model_copy(update={"split": list(partition)})
    parts = together(world, lambda: _build_parts(cut, data, world, goes_on=partition is not None))
    profile = share_profile(parts.profile, world)
    prepared = together(world, lambda: _assemble(cut, name, world, parts, profile, teacher_from))
    return replace(prepared, recipe=recipe)


@dataclass(frozen=True)
class _Parts:
    data: ImageDataset
    model: UnitClassifier
    preprocessing: Preprocessing
    loaders: tuple[ImageLoader, ImageLoader]
    profile: Profile | None  # on the rank that measures
    deferred: Deferred | None  # fills this rank's part of the model; None where it is complete


def _build_parts(recipe: Recipe, data: Splits | None, world: World, goes_on: bool) -> _Parts:
    """What depends on no other process."""
    train, val = data or open_data(recipe)
    model, deferred = (
        (build_model(recipe, train, world.device), None) if world.size == 1 else build_in_parts(recipe, train)
    )
    preprocessing = preprocessing_for(recipe, train, model)
    if deferred is None:
        check_units(recipe, model, preprocessing)
    threads = None if goes_on else threads_for(recipe, model, preprocessing.input_size, world.device)
    if threads:  # a run that goes on has taken those that it had
        torch.set_num_threads(threads)
    loaders = build_loaders(recipe, train, val, preprocessing, world)
    if data is None:  # what is handed in stands for more, and for larger micro-batches
        check_batches(recipe, loaders[0])
        check_run_length(recipe, len(loaders[0]))
        check_norms(recipe, model, preprocessing)
    profile = profile_for_run(recipe, model, preprocessing, world)
    return _Parts(train, model, preprocessing, loaders, profile, deferred)


def _assemble(
    recipe: Recipe, name: str, world: World, parts: _Parts, profile: Profile | None, teacher_from: LoadTeacher
) -> Prepared:
    """The order matters: norms and couplings decide what the pipeline's units are, and the pipeline which are here."""
    model, preprocessing, train_loader = parts.model, parts.preprocessing, parts.loaders[0]
    if recipe.sync_bn and world.replicas > 1:  # not before: a profile is measured by one process alone
        synchronize_statistics(model, world)
    if recipe.compile:  # nor this: what is measured must not be the compiler's time
        require_compiler(world.device)
        compile_branches(model, CompileOptions())
    schedule = start_schedule(recipe, model)
    teacher = teacher_from(recipe, world.device) if world.first else None
    loss = build_loss(recipe, parts.data, model.num_classes, world.device)
    distillation = build_distillation(recipe, teacher, model.num_classes, preprocessing, parts.data, loss)
    loss = distillation.loss if distillation else loss
    transform = BatchTransform(preprocessing, world.device)
    pipeline = build_pipeline(
        recipe, model, len(train_loader), preprocessing, world, profile, loss, transform, parts.deferred
    )
    ema = _moving_average(model, recipe.model_ema_decay, world.device) if recipe.model_ema else None
    return Prepared(
        recipe=recipe,
        name=name,
        world=world,
        data=parts.data,
        train_loader=train_loader,
        val_loader=parts.loaders[1],
        model=model,
        preprocessing=preprocessing,
        transform=transform,
        profile=profile,
        pipeline=pipeline,
        ema=ema,
        distillation=distillation,
        schedule=schedule,
    )


def _moving_average(model: UnitClassifier, decay: float, device: torch.device) -> ModelEmaV3:
    """timm's, of a model whose first parameter may be on the meta device, which it asks for its device."""
    average = ModelEmaV3(torch.nn.Linear(1, 1, device=device), decay=decay)
    average.module = copy.deepcopy(model).eval()
    return average
