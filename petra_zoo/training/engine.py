"""The engine for a recipe: what balances its stages, how they are laid out over ranks, and the pipeline of them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import torch
import torch.nn.functional as F

from petra_zoo.data.preprocessing import Preprocessing
from petra_zoo.errors import UserError
from petra_zoo.models.classifier import UnitClassifier
from petra_zoo.models.deferred import Deferred
from petra_zoo.petra import Costs, Layout, Method, Optimization, Pipeline, Profile, Wire, World, find_method, measure
from petra_zoo.petra.part import Loss
from petra_zoo.petra.preparing import Prepare
from petra_zoo.petra.world import START_TIMEOUT
from petra_zoo.reversible import units_of
from petra_zoo.settings.recipe import Recipe
from petra_zoo.training.optimization import optimizer_factory, scheduler_factory


def profile_for_run(
    recipe: Recipe, model: UnitClassifier, preprocessing: Preprocessing, world: World
) -> Profile | None:
    """The measured costs that the partition goes by: read or measured on one rank; None on the others, or to count.

    Raises:
        UserError: the file is not a profile, or is another model's.
    """
    units = len(units_of(model))
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
    size, autocast = preprocessing.input_size, autocast_type(recipe)
    return measure(model, recipe.batch_size, size, autocast=autocast, fed=torch.uint8, device=world.device)


def share_profile(found: Profile | None, world: World) -> Profile | None:
    """The profile that one rank found, in every process: all of them must cut the model alike."""
    return next((profile for profile in world.gather(found) if profile is not None), None)


def build_pipeline(
    recipe: Recipe,
    model: UnitClassifier,
    batches_per_epoch: int,
    preprocessing: Preprocessing,
    world: World | None = None,
    profile: Profile | None = None,
    loss: Loss = F.cross_entropy,
    prepare: Prepare | None = None,
    deferred: Deferred | None = None,
) -> Pipeline:
    """The engine for a recipe.

    Args:
        recipe: the settings.
        model: complete, or built by `deferred`.
        batches_per_epoch: micro-batches of this replica.
        preprocessing: of its images.
        world: this process's place; default: alone.
        profile: measured costs of the units.
        loss, prepare: as `Pipeline` takes them.
        deferred: fills the parts of the model that are this rank's; None where it is complete.

    Raises:
        UserError: stages, split or the number of processes do not fit the model.
    """
    up, down = (getattr(torch, name) if name else None for name in (recipe.wire_up, recipe.wire_down))
    # A branch that is compiled anew, for the smaller last batch, takes a minute or more.
    timeout = max(recipe.link_timeout, START_TIMEOUT.total_seconds()) if recipe.compile else recipe.link_timeout
    world = replace(world or World(device=next(model.parameters()).device), wire=Wire(up, down, timeout))
    method = _method(recipe)
    layout = lay_out(recipe, model, preprocessing, world.size, profile)
    if deferred:
        _fill_own(model, deferred, layout.units_of_rank(world.rank))
    optimization = Optimization(
        optimizer_factory(recipe, model),
        scheduler_factory(recipe, batches_per_epoch),
        recipe.accumulation_steps,
        recipe.clip_grad,
        recipe.weight_prediction,
    )
    return Pipeline(
        model,
        layout,
        method=method,
        optimization=optimization,
        loss=loss,
        autocast=autocast_type(recipe),
        seed=recipe.seed,
        prepare=prepare,
        world=world,
        graphs=recipe.cuda_graphs,
        on_nonfinite=recipe.on_nonfinite,
    )


def _fill_own(model: UnitClassifier, deferred: Deferred, own: Collection[int]) -> None:
    """Fills what stays in this process: its units, and what belongs to none."""
    units = units_of(model)
    here = {module for i in own for module in units[i].modules()}
    others = {module for unit in units for module in unit.modules()} - here
    deferred.fill(model, leave=others)


def lay_out(
    recipe: Recipe, model: UnitClassifier, preprocessing: Preprocessing, ranks: int, profile: Profile | None = None
) -> Layout:
    """The units in stages, the stages on ranks.

    Raises:
        UserError: stages, split, speeds or the number of ranks do not fit the model.
    """
    method = _method(recipe)
    return Layout.of(
        model,
        recipe.split or recipe.stages,
        method=method,
        ranks=ranks,
        costs=None if profile is None else Costs.measured(profile, method),
        input_size=preprocessing.input_size,
        device_speed=recipe.device_speed,
    )


def check_processes(
    recipe: Recipe, model: UnitClassifier, preprocessing: Preprocessing, processes: int | None = None
) -> None:
    """Refuses numbers of processes over which the stages cannot be spread.

    Args:
        recipe: the settings.
        model: complete.
        preprocessing: of its images.
        processes: of all replicas together; default: one per replica, or as `device_speed` says.

    Raises:
        UserError: says how many would do.
    """
    replicas = recipe.data_parallel
    processes = processes or replicas * len(recipe.device_speed or [1.0])
    if processes % replicas:
        raise UserError(f"data_parallel={replicas} does not divide {processes} processes: launch a multiple of it")
    lay_out(recipe, model, preprocessing, processes // replicas)


def autocast_type(recipe: Recipe) -> torch.dtype | None:
    """What autocast computes in; None without it."""
    found: torch.dtype | None = getattr(torch, recipe.amp_dtype) if recipe.amp else None
    return found


def _method(recipe: Recipe) -> Method:
    return find_method(recipe.method).with_last_stage(recipe.last_stage)
