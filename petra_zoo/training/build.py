"""From a recipe to the objects of a run: data, model, optimizer, schedule, pipeline."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from torch import nn

from petra_zoo.checkpoints.hub_errors import first_line
from petra_zoo.checkpoints.load import check_image_size, create_model
from petra_zoo.data.datasets import ImageDataset, open_dataset
from petra_zoo.data.labels import number_like
from petra_zoo.data.loader import ImageLoader, create_loader
from petra_zoo.device import choose_device
from petra_zoo.errors import UserError
from petra_zoo.petra import Pipeline, Profile, Wire, World, measure
from petra_zoo.petra.stage import Loss
from petra_zoo.settings.recipe import Recipe
from petra_zoo.training.finetuning import check_architecture, checkpoint_name, freeze
from petra_zoo.training.head import arrange_head

NamedParameters = list[tuple[str, nn.Parameter]]


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


def build_model(recipe: Recipe, train: ImageDataset, device: torch.device | None = None) -> Any:
    """The recipe's model for the classes of the data, from its seed or a checkpoint; default: on its device."""
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
    if recipe.pretrained and train.named:
        arrange_head(model, train.class_names)
    check_image_size(model, recipe.model, image_size(recipe, train, model))
    freeze(recipe, model)
    return model.to(device or choose_device(recipe.device)).to(memory_format=memory_format(recipe))


def memory_format(recipe: Recipe) -> torch.memory_format:
    """How image tensors are laid out."""
    return torch.channels_last if recipe.channels_last else torch.contiguous_format


def image_size(recipe: Recipe, data: ImageDataset, model: Any) -> int:
    """Height and width of the network's input: the recipe's, else the images' own, else the model's."""
    return int(recipe.img_size or data.image_size or model.pretrained_cfg["input_size"][-1])


def data_config(recipe: Recipe, data: ImageDataset, model: Any) -> dict[str, Any]:
    """What preprocessing a checkpoint of this run needs, in timm's words; it goes into config.json."""
    size = image_size(recipe, data, model)
    # A checkpoint goes on with the normalisation it was trained with.
    source = model.pretrained_cfg if recipe.pretrained else {"mean": data.mean, "std": data.std}
    mean, std = (_per_channel(source[key], recipe.in_chans) for key in ("mean", "std"))
    native = data.image_size == size
    return {
        "input_size": (recipe.in_chans, size, size),
        "mean": tuple(recipe.mean or mean),
        "std": tuple(recipe.std or std),
        "interpolation": "bicubic" if recipe.interpolation == "random" else recipe.interpolation,
        "crop_pct": recipe.crop_pct or (1.0 if native else 0.875),
    }


def build_loaders(
    recipe: Recipe, train: ImageDataset, val: ImageDataset, config: dict[str, Any], world: World
) -> tuple[ImageLoader, ImageLoader]:
    """Loaders of both splits: this replica's share of the training split, the whole validation split."""
    common = {key: config[key] for key in ("input_size", "mean", "std")} | {
        "augmentation": recipe,
        "seed": recipe.seed,
        "workers": recipe.workers,
        "on_bad_image": recipe.on_bad_image,
        "pin_memory": world.device.type == "cuda",
    }
    return (
        create_loader(
            train,
            batch_size=recipe.batch_size,
            train=True,
            shard=world.replica,
            shards=world.replicas,
            **common,
        ),
        create_loader(
            val, batch_size=recipe.validation_batch_size or recipe.batch_size, train=False, leave_out=True, **common
        ),
    )


def optimizer_factory(recipe: Recipe, model: Any) -> Callable[[NamedParameters], torch.optim.Optimizer]:
    """Makes a stage's optimizer: timm's, with timm's parameter groups of the whole model cut down to the stage."""
    skip = set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()
    if recipe.layer_decay is not None:
        groups = param_groups_layer_decay(
            model, recipe.weight_decay, no_weight_decay_list=skip, layer_decay=recipe.layer_decay
        )
    else:
        groups = param_groups_weight_decay(model, recipe.weight_decay, no_weight_decay_list=skip)
    in_model = {name for name, _ in model.named_parameters()}
    options: dict[str, Any] = dict(recipe.opt_kwargs)
    if recipe.opt_eps is not None:
        options["eps"] = recipe.opt_eps
    if recipe.opt_betas is not None:
        options["betas"] = recipe.opt_betas

    def make(named: NamedParameters) -> torch.optim.Optimizer:
        own = {id(p) for _, p in named}
        mine = [{**group, "params": [p for p in group["params"] if id(p) in own]} for group in groups]
        auxiliary = [p for name, p in named if name not in in_model]  # of local learning
        mine.append({"params": [p for p in auxiliary if p.ndim > 1]})
        mine.append({"params": [p for p in auxiliary if p.ndim == 1], "weight_decay": 0.0})
        try:
            return create_optimizer_v2(
                [group for group in mine if group["params"]],
                opt=recipe.opt,
                lr=recipe.learning_rate,
                momentum=recipe.momentum,
                weight_decay=recipe.weight_decay,
                **options,
            )
        except (TypeError, ValueError) as error:
            raise UserError(f"optimizer {recipe.opt!r}: {first_line(error)}") from error

    return make


def scheduler_factory(recipe: Recipe, batches_per_epoch: int) -> Callable[[torch.optim.Optimizer], Any]:
    """Makes a stage's schedule: timm's, advanced with every update."""
    updates = max(1, math.ceil(batches_per_epoch / recipe.accumulation_steps))

    def make(optimizer: torch.optim.Optimizer) -> Any:
        return create_scheduler_v2(
            optimizer,
            sched=recipe.sched,
            num_epochs=recipe.epochs,
            decay_epochs=recipe.decay_epochs,
            decay_milestones=recipe.decay_milestones,
            cooldown_epochs=recipe.cooldown_epochs,
            decay_rate=recipe.decay_rate,
            min_lr=recipe.min_lr,
            warmup_lr=recipe.warmup_lr,
            warmup_epochs=recipe.warmup_epochs,
            warmup_prefix=recipe.warmup_prefix,
            step_on_epochs=False,
            updates_per_epoch=updates,
        )[0]

    return make


def learning_rates(recipe: Recipe, batches_per_epoch: int) -> Callable[[int], float]:
    """The learning rate of the schedule after so many updates, before `layer_decay` scales it layer by layer."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=recipe.learning_rate)
    schedule = scheduler_factory(recipe, batches_per_epoch)(optimizer)

    def rate(updates: int) -> float:
        if schedule is not None and updates > 0:
            schedule.step_update(updates)
        return float(optimizer.param_groups[0]["lr"])

    return rate


def autocast_type(recipe: Recipe) -> torch.dtype | None:
    """What autocast computes in; None without it."""
    found: torch.dtype | None = getattr(torch, recipe.amp_dtype) if recipe.amp else None
    return found


def check_feed(recipe: Recipe, loader: ImageLoader, model: Any, config: dict[str, Any]) -> None:
    """Refuses micro-batches that the data does not fill, too few for an update, or too small for the network.

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
    shared = recipe.sync_bn and recipe.data_parallel > 1  # norms see all replicas' images
    if shared or min(recipe.batch_size, images) > 1:  # a last micro-batch of one is left out
        return
    on_meta = copy.deepcopy(model).to("meta").train()
    try:
        with torch.no_grad():
            on_meta(torch.empty(1, *config["input_size"], device="meta"))
    except ValueError as error:
        raise UserError(
            f"batch_size=1: a norm of {recipe.model} sees one value per channel at this image size and cannot tell "
            "their variance; expected batch_size=2 or more, larger images, or freeze_bn=true"
        ) from error


def find_profile(recipe: Recipe, model: Any, config: dict[str, Any], world: World) -> Profile | None:
    """The measured costs that the partition goes by: read or measured on one rank; None on the others, or to count.

    Raises:
        UserError: the file is not a profile, or is another model's.
    """
    units = len(model.units())
    if world.rank > 0 or world.replica > 0:  # all go by one: see `share_profile`
        return None
    if recipe.profile is not None:
        profile = Profile.load(recipe.profile)
        if len(profile.units) != units:
            raise UserError(
                f"{recipe.profile} has {len(profile.units)} units, {recipe.model} has {units}: measure anew"
            )
        return profile
    given = recipe.split is not None or recipe.stages in (1, units)
    if recipe.balance == "operations" or given or (recipe.balance == "auto" and world.size == 1):
        return None
    measured = copy.deepcopy(model).to(world.device)
    return measure(measured, recipe.batch_size, config["input_size"], autocast=autocast_type(recipe))


def share_profile(found: Profile | None, world: World) -> Profile | None:
    """The profile that one rank found, in every process: all of them must cut the model alike."""
    return next((profile for profile in world.gather(found) if profile is not None), None)


def build_pipeline(
    recipe: Recipe,
    model: Any,
    batches_per_epoch: int,
    config: dict[str, Any],
    world: World | None = None,
    profile: Profile | None = None,
    loss: Loss = F.cross_entropy,
) -> Pipeline:
    """The engine for a recipe.

    Raises:
        UserError: stages, split or the number of processes do not fit the model.
    """
    try:
        return Pipeline(
            model,
            None if recipe.split else recipe.stages,
            split=recipe.split,
            method=recipe.method,
            accumulation_steps=recipe.accumulation_steps,
            optimizer=optimizer_factory(recipe, model),
            scheduler=scheduler_factory(recipe, batches_per_epoch),
            loss=loss,
            autocast=autocast_type(recipe),
            clip_grad=recipe.clip_grad,
            last_stage=recipe.last_stage,
            seed=recipe.seed,
            input_size=config["input_size"],
            profile=profile,
            device_speed=recipe.device_speed,
            world=world,
            wire=Wire(*(name and getattr(torch, name) for name in (recipe.wire_up, recipe.wire_down))),
            timeout=recipe.link_timeout,
        )
    except ValueError as error:
        raise UserError(str(error)) from error


def _per_channel(values: Sequence[float], channels: int) -> tuple[float, ...]:
    return tuple(values) if len(values) == channels else (sum(values) / len(values),) * channels
