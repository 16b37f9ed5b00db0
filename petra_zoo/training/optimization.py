"""Optimizers and learning rates: timm's, made for each stage of a pipeline from the settings of a recipe."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib.util import find_spec
from typing import Any, Protocol, TypedDict, runtime_checkable

import torch
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn

from petra_zoo.checkpoints.hub_errors import first_line
from petra_zoo.errors import UserError
from petra_zoo.settings.recipe import Recipe
from petra_zoo.training.length import updates_in

NamedParameters = list[tuple[str, nn.Parameter]]
# Options of `create_optimizer_v2` that it reads where it makes the groups, by their names in the functions that do.
_GROUPING = {
    "filter_bias_and_bn": "weight_decay_exclude_1d",
    "fallback_list": "fallback_list",
    "fallback_no_weight_decay": "fallback_no_weight_decay",
}
_TIMM_DECAY_EPOCHS = 90  # of its `step`
_LAYER_GROUPING = {"layer_decay_min_scale": "min_scale", "layer_decay_no_opt_scale": "no_opt_scale"}


@runtime_checkable
class _SparesDecay(Protocol):
    """A network of timm's that names parameters which are not to decay."""

    def no_weight_decay(self) -> Iterable[str]: ...


def optimizer_factory(recipe: Recipe, model: nn.Module) -> Callable[[NamedParameters], torch.optim.Optimizer]:
    """Makes a stage's optimizer: timm's, with timm's parameter groups of the whole model cut down to the stage.

    Raises:
        UserError: the optimizer needs a package that is not installed.
    """
    # Without it torch contracts from left to right, through tensors as large as all factors' product.
    if recipe.opt.removeprefix("lookahead_").startswith("kron") and find_spec("opt_einsum") is None:
        raise UserError(f"optimizer {recipe.opt!r} needs the package opt_einsum: pip install opt_einsum")
    options = dict(recipe.opt_kwargs)
    groups = _groups(recipe, model, options)
    in_model = {name for name, _ in model.named_parameters()}
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


def _groups(recipe: Recipe, model: nn.Module, options: dict[str, Any]) -> list[dict[str, Any]]:
    """timm's parameter groups of a whole model; takes out of the options those that are about groups."""
    spared = set(model.no_weight_decay()) if isinstance(model, _SparesDecay) else set()
    grouping = {theirs: options.pop(name) for name, theirs in _GROUPING.items() if name in options}
    by_layer = {theirs: options.pop(name) for name, theirs in _LAYER_GROUPING.items() if name in options}
    if recipe.layer_decay is None:
        return param_groups_weight_decay(model, recipe.weight_decay, no_weight_decay_list=spared, **grouping)
    return param_groups_layer_decay(
        model,
        recipe.weight_decay,
        no_weight_decay_list=spared,
        layer_decay=recipe.layer_decay,
        **grouping,
        **by_layer,
    )


def scheduler_factory(recipe: Recipe, batches_per_epoch: int) -> Callable[[torch.optim.Optimizer], Scheduler | None]:
    """Makes a stage's schedule: timm's, advanced with every update.

    Raises:
        UserError: there is no such schedule of these lengths.
    """
    times = _schedule_times(recipe, batches_per_epoch)

    def make(optimizer: torch.optim.Optimizer) -> Scheduler | None:
        try:
            return create_scheduler_v2(
                optimizer,
                sched=recipe.sched,
                decay_rate=recipe.decay_rate,
                min_lr=recipe.min_lr,
                warmup_lr=recipe.warmup_lr,
                warmup_prefix=recipe.warmup_prefix,
                step_on_epochs=False,
                **times,
            )[0]
        except ValueError as error:
            raise UserError(f"sched={recipe.sched}: {_no_schedule(recipe, times) or first_line(error)}") from error

    return make


class _Times(TypedDict):
    """What timm multiplies by `updates_per_epoch`."""

    num_epochs: int
    warmup_epochs: int
    cooldown_epochs: int
    decay_epochs: float | None
    decay_milestones: list[int]
    updates_per_epoch: int


def _schedule_times(recipe: Recipe, batches: int) -> _Times:
    """When a schedule does what, by epochs of so many micro-batches where these are whole updates; else by updates.

    What timm takes for a share of the schedule stays one.
    """
    by_epochs = recipe.epochs is not None and batches % recipe.accumulation_steps == 0
    per_epoch = 1 if by_epochs else batches / recipe.accumulation_steps

    def length(epochs: int) -> int:
        return epochs if by_epochs else updates_in(recipe, batches, epochs)

    if recipe.epochs is not None:
        num_epochs = length(recipe.epochs)
    else:
        assert recipe.max_updates is not None
        num_epochs = max(1, recipe.max_updates - length(recipe.epochs_beside))
    decay = recipe.decay_epochs or (_TIMM_DECAY_EPOCHS if recipe.sched == "step" else None)
    is_share = decay is not None and decay < 1 and recipe.sched in ("wsd", "rsqrt")
    return {
        "num_epochs": num_epochs,
        "warmup_epochs": length(recipe.warmup_epochs),
        "cooldown_epochs": length(recipe.cooldown_epochs),
        "decay_epochs": decay if decay is None or is_share else decay * per_epoch,
        "decay_milestones": [length(epoch) for epoch in recipe.decay_milestones],
        "updates_per_epoch": batches // recipe.accumulation_steps if by_epochs else 1,
    }


def _no_schedule(recipe: Recipe, times: _Times) -> str | None:
    """Why timm makes none, as settings: where nothing is left between warm-up and end, or less than the decay takes."""
    left = times["num_epochs"] - (0 if recipe.warmup_prefix else times["warmup_epochs"])
    length = f"epochs={recipe.epochs}" if recipe.max_updates is None else f"max_updates={recipe.max_updates}"
    if left <= 0:
        return f"warmup_epochs={recipe.warmup_epochs} takes all of {length}; expected fewer, or a longer run"
    if recipe.decay_epochs is not None:
        return f"decay_epochs={recipe.decay_epochs:g} is more than {length} leaves behind warmup_epochs; expected less"
    return None


def learning_rates(recipe: Recipe, batches_per_epoch: int) -> Callable[[int], float]:
    """The learning rate of the schedule after so many updates, before `layer_decay` scales it layer by layer."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=recipe.learning_rate)
    schedule = scheduler_factory(recipe, batches_per_epoch)(optimizer)

    def rate(updates: int) -> float:
        if schedule is not None and updates > 0:
            schedule.step_update(updates)
        return float(optimizer.param_groups[0]["lr"])

    return rate
