"""What is trained on what: data, model and loaders, each from the settings of a recipe."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from timm.models import get_model_input_config
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from petra_zoo.checkpoints.load import create_model, set_image_size
from petra_zoo.data.datasets import ImageDataset, open_dataset
from petra_zoo.data.labels import number_like
from petra_zoo.data.loader import ImageLoader, Reading, Sharding, create_loader
from petra_zoo.data.preprocessing import Preprocessing
from petra_zoo.errors import UserError
from petra_zoo.models.classifier import Classifier, UnitClassifier
from petra_zoo.models.deferred import Deferred
from petra_zoo.models.memory_modes import MemoryModes
from petra_zoo.petra import World
from petra_zoo.reversible import CoupledUnit, units_of
from petra_zoo.settings.recipe import Recipe
from petra_zoo.settings.update import SMALLEST_FOR_BATCH_NORM, nearest_choices
from petra_zoo.training.finetuning import arrange_head, check_architecture, checkpoint_name, freeze, is_frozen_norm


def open_data(recipe: Recipe, *, verify: bool = True) -> tuple[ImageDataset, ImageDataset]:
    """The training and the validation split; `verify` as in `open_dataset`.

    Raises:
        UserError: the data is missing or has more classes than the recipe says.
    """
    train, val = (
        open_dataset(
            recipe.dataset,
            split,
            data_dir=recipe.data_dir,
            download=recipe.dataset_download,
            split_name=recipe.train_split if split == "train" else recipe.val_split,
            verify=verify,
            val_fraction=recipe.val_fraction,
        )
        for split in ("train", "val")
    )
    number_like(val, train, f"the training split of {recipe.dataset}", "its validation split")
    if recipe.num_classes is not None and recipe.num_classes < train.num_classes:
        raise UserError(
            f"num_classes={recipe.num_classes}, but data set {recipe.dataset} has labels 0 to {train.num_classes - 1}: "
            f"set num_classes={train.num_classes}, or leave it out"
        )
    return train, val


def build_model(recipe: Recipe, train: ImageDataset, device: torch.device | str = "cpu") -> UnitClassifier:
    """The recipe's model for the classes of the data, from its seed or a checkpoint."""
    torch.manual_seed(recipe.seed)
    kwargs = dict(recipe.model_kwargs)
    if recipe.drop:
        kwargs["drop_rate"] = recipe.drop
    if recipe.drop_path:
        kwargs["drop_path_rate"] = recipe.drop_path
    model = create_model(
        checkpoint_name(recipe),
        pretrained=bool(recipe.pretrained),
        num_classes=recipe.num_classes or train.num_classes,
        in_chans=recipe.in_chans,
        **kwargs,
    )
    check_architecture(recipe, model)
    set_streams(recipe, model)
    if recipe.pretrained and train.named:
        arrange_head(model, train.class_names)
    size = image_size(recipe, train, model)
    set_image_size(model, recipe.model, size, size)
    freeze(recipe, model, size)
    return model.to(device).to(memory_format=memory_format(recipe))


def build_in_parts(recipe: Recipe, train: ImageDataset) -> tuple[UnitClassifier, Deferred | None]:
    """The same model on the CPU, for a process that will keep a part of it.

    Returns:
        The zoo's own networks without their large tensors, and what fills them, so that networks larger than a
        process's memory can be trained; others complete, because their units are still to be checked.
    """
    if recipe.model.partition(".")[0] == "petra_any":  # it looks for its blocks on the meta device while it is built
        return build_model(recipe, train), None
    with Deferred.building() as deferred:
        model = build_model(recipe, train)
    if type(model).__module__.startswith("petra_zoo."):
        return model, deferred
    deferred.fill(model)
    return model, None


def set_streams(recipe: Recipe, model: nn.Module) -> None:
    """Sets what carries the streams, where the recipe says it.

    Raises:
        UserError: the network's streams have one type only.
    """
    if recipe.streams == "auto":
        return
    if not isinstance(model, MemoryModes):
        raise UserError(
            f"streams={recipe.streams}: {recipe.model} has no choice of it, only the zoo's own networks have; expected "
            "streams=auto"
        )
    model.set_streams(recipe.streams)


def memory_format(recipe: Recipe) -> torch.memory_format:
    """How image tensors are laid out."""
    return torch.channels_last if recipe.channels_last else torch.contiguous_format


def image_size(recipe: Recipe, data: ImageDataset, model: Classifier) -> int:
    """Height and width of the network's input: the recipe's, else the images' own, else the model's."""
    return int(recipe.img_size or data.image_size or get_model_input_config(model)["input_size"][-1])


def preprocessing_for(recipe: Recipe, data: ImageDataset, model: Classifier) -> Preprocessing:
    """What a checkpoint of this run needs done to an image."""
    size = image_size(recipe, data, model)
    # A checkpoint goes on with the normalisation it was trained with.
    config = model.pretrained_cfg
    mean, std = (config["mean"], config["std"]) if recipe.pretrained else (data.mean, data.std)
    return Preprocessing(
        (recipe.in_chans, size, size),
        tuple(recipe.mean or _per_channel(mean, recipe.in_chans)),
        tuple(recipe.std or _per_channel(std, recipe.in_chans)),
        interpolation="bicubic" if recipe.interpolation == "random" else recipe.interpolation,
        crop_pct=recipe.crop_pct or (1.0 if data.image_size == size else 0.875),
    )


def build_loaders(
    recipe: Recipe, train: ImageDataset, val: ImageDataset, preprocessing: Preprocessing, world: World
) -> tuple[ImageLoader, ImageLoader]:
    """Loaders of both splits: this replica's share of the training split, the whole validation split."""
    reading = Reading(recipe.workers, recipe.on_bad_image, pin_memory=world.device.type == "cuda")
    return (
        create_loader(
            train,
            preprocessing,
            batch_size=recipe.batch_size,
            augmentation=recipe,
            seed=recipe.seed,
            balanced=recipe.sampler == "balanced",
            num_classes=recipe.num_classes,
            sharding=Sharding(world.replica, world.replicas),
            reading=reading,
        ),
        create_loader(
            val,
            preprocessing,
            batch_size=recipe.validation_batch_size or recipe.batch_size,
            reading=replace(reading, leave_out=True),
        ),
    )


def check_batches(recipe: Recipe, loader: ImageLoader) -> None:
    """Refuses micro-batches that the data does not fill, or too few for an update.

    Raises:
        UserError: says which setting to change, and to what.
    """
    batches, images = len(loader), len(loader.dataset)
    if recipe.batch_size > images:  # the learning rate and its schedule would go by images that there are not
        raise UserError(
            f"batch_size={recipe.batch_size} is more than the {images} training images; expected at most that"
        )
    if recipe.accumulation_steps > batches:
        raise UserError(
            f"accumulation_steps={recipe.accumulation_steps} is more than the {batches} micro-batches of an epoch: no "
            f"update would be made in it; expected {batches} or less, or a smaller batch_size"
        )


def check_units(recipe: Recipe, model: UnitClassifier, preprocessing: Preprocessing) -> None:
    """Refuses a network whose units compute something else than it does: what is trained would not be what is saved.

    Raises:
        UserError: says which unit, or that it is all of them together.
    """
    device = next(model.parameters()).device
    image = torch.randn(1, *preprocessing.input_size, generator=torch.Generator().manual_seed(0)).to(device)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            streams: tuple[Tensor, ...] = (image,)
            for unit in units_of(model):
                before, streams = streams, unit(*streams)
                if not isinstance(streams, tuple):
                    raise UserError(
                        f"unit {unit.name} of {recipe.model} gives a {type(streams).__name__}: expected a tuple of "
                        "tensors, such as (x,)"
                    )
                if isinstance(unit, CoupledUnit) and streams[0].shape != before[0].shape:
                    raise UserError(
                        f"the branch of unit {unit.name} of {recipe.model} turns {list(before[0].shape)} into "
                        f"{list(streams[0].shape)}: expected the same shape; make it a FunctionUnit"
                    )
            logits = model(image)
    finally:
        model.train(was_training)
    if logits.shape != (1, model.num_classes):
        raise UserError(f"{recipe.model} gives logits of shape {list(logits.shape)}: expected [1, {model.num_classes}]")
    if not torch.allclose(streams[0], logits, rtol=1e-3, atol=1e-3 * float(logits.abs().max()), equal_nan=True):
        raise UserError(
            f"units() of {recipe.model} and the model compute different logits in eval mode: calling the model must "
            "equal running its units, one after the other"
        )


def check_norms(recipe: Recipe, model: UnitClassifier, preprocessing: Preprocessing) -> None:
    """Refuses micro-batches that are too small for the network's norms.

    Batch norms of a pipeline see micro-batches, not updates; frozen ones see none, synchronised ones all replicas'. A
    smaller last micro-batch of an epoch is as it may be: one of a single image is left out anyway.

    Raises:
        UserError: says which setting to change, and to what.
    """
    seen = recipe.batch_size * (recipe.data_parallel if recipe.sync_bn else 1)
    live = [norm for norm in model.modules() if isinstance(norm, _BatchNorm) and not is_frozen_norm(norm)]
    if live and seen < SMALLEST_FOR_BATCH_NORM:
        raise UserError(_too_few(live, recipe, seen))
    if seen > 1:
        return
    on_meta: nn.Module = copy.deepcopy(model).to("meta").train()
    try:
        with torch.no_grad():
            on_meta(torch.empty(1, *preprocessing.input_size, device="meta"))
    except ValueError as error:
        raise UserError(
            f"batch_size=1: a norm of {recipe.model} sees one value per channel at this image size and cannot tell "
            "their variance; expected batch_size=2 or more, or larger images"
        ) from error


def _too_few(norms: Sequence[_BatchNorm], recipe: Recipe, seen: int) -> str:
    """Why batch norms cannot train on this recipe's micro-batches, and what would do."""
    smallest = math.ceil(SMALLEST_FOR_BATCH_NORM * recipe.batch_size / seen)
    if recipe.update_size is None:
        given, expected = f"batch_size={recipe.batch_size}", f"batch_size={smallest} or more"
    elif recipe.max_delay is None:
        parts = recipe.accumulation_steps * recipe.data_parallel
        given, expected = (
            f"update_size={recipe.update_size}",
            f"update_size={smallest * parts} or more",
        )
    else:
        given = (
            f"batch_size={recipe.batch_size}, by update_size={recipe.update_size} and max_delay={recipe.max_delay:g}"
        )
        expected = nearest_choices(recipe.update_size, recipe.max_delay, recipe.stages, recipe.data_parallel, smallest)
    # timm's group norm has groups of 32 channels; narrower networks take its other one, with one group of all.
    group_norm = "groupnorm" if all(norm.num_features % 32 == 0 for norm in norms) else "groupnorm1"
    return (
        f"{given}: batch norms see micro-batches, and {seen} image{'s are' if seen > 1 else ' is'} too few for their "
        f"statistics; expected {expected}, or group norm, model_kwargs={{norm_layer: {group_norm}}}, or freeze_bn=true "
        "for a network that is trained already"
    )


def _per_channel(values: Sequence[float], channels: int) -> tuple[float, ...]:
    return tuple(values) if len(values) == channels else (sum(values) / len(values),) * channels
