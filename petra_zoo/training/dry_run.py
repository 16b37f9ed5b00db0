"""What a recipe would train, before it is trained: everything is built, nothing is begun or written."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from petra_zoo.data.balance import class_counts
from petra_zoo.data.image_dataset import ImageDataset
from petra_zoo.petra.measuring import measure
from petra_zoo.planning.cluster import Cluster
from petra_zoo.planning.performance import forecast
from petra_zoo.planning.quantities import format_bytes
from petra_zoo.planning.schedules import all_schedules
from petra_zoo.settings.delay import above_border, advice, say_update
from petra_zoo.settings.recipe import Recipe
from petra_zoo.training.engine import autocast_type
from petra_zoo.training.length import say_length, warn_of_warm_up
from petra_zoo.training.log_writers import require_log_writers
from petra_zoo.training.preparation import Prepared, prepare
from petra_zoo.training.threads import threads_restored
from petra_zoo.wording import counted

_FEW = 10  # classes that are named one by one


@dataclass(frozen=True)
class Outlook:
    """What would be trained.

    Attributes:
        parameters: of the network; `trained`: of them those that change.
        updates_per_epoch: on average; windows run on over an epoch's end.
        length: of the run, such as `20 epochs`.
        too_few: what is wrong where the updates do not reach behind the warm-up.
        train_images, val_images: of each class, by its name.
        split: units per stage.
        stage_bytes: what a device would hold at most for each stage, without what an allocator adds; None where the
            planner does not know the method.
    """

    recipe: Recipe
    parameters: int
    trained: int
    updates_per_epoch: float
    length: str
    too_few: str | None
    train_images: dict[str, int]
    val_images: dict[str, int]
    split: tuple[int, ...]
    stage_bytes: tuple[int, ...] | None

    def lines(self) -> list[str]:
        """For people."""
        recipe, warned = self.recipe, above_border(self.recipe.delay[0], self.recipe.opt)
        per_stage = [counted(size, "unit") for size in self.split]
        if self.stage_bytes is not None:
            per_stage = [f"{units}, {format_bytes(n)}" for units, n in zip(per_stage, self.stage_bytes, strict=True)]
        share = "" if self.trained == self.parameters else f", of which {self.trained:,} are trained"
        return [
            f"network   {recipe.model}, {self.parameters:,} parameters{share}",
            f"training  {_count(self.train_images)}",
            f"checking  {_count(self.val_images)}",
            f"update    {say_update(recipe)}",
            *([f"warning   {warned}: {advice(recipe)}"] if warned else []),
            f"schedule  {_number(self.updates_per_epoch)} per epoch, {self.length}, {recipe.opt} at a "
            f"learning rate of {recipe.learning_rate:g} at most ({recipe.sched})",
            *([f"warning   {self.too_few}"] if self.too_few else []),
            *(f"stage {j:<4}{text}" for j, text in enumerate(per_stage)),
        ]


@threads_restored()
def outlook(recipe: Recipe, name: str = "run") -> Outlook:
    """Builds what a recipe asks for, in this process alone, and says what would be trained.

    Takes the data's labels and some steps of the network, to count what they keep.

    Raises:
        UserError: settings, data or devices do not allow it: what `train` would say.
    """
    require_log_writers(recipe.log_to)
    prepared = prepare(recipe, name=name)
    parameters = list(prepared.model.parameters())
    return Outlook(
        recipe=recipe,
        parameters=sum(p.numel() for p in parameters),
        trained=sum(p.numel() for p in parameters if p.requires_grad),
        updates_per_epoch=len(prepared.train_loader) / recipe.accumulation_steps,
        length=say_length(recipe),
        too_few=warn_of_warm_up(recipe, len(prepared.train_loader)),
        train_images=_per_class(prepared.train_loader.dataset),
        val_images=_per_class(prepared.val_loader.dataset),
        split=tuple(prepared.pipeline.layout.sizes),
        stage_bytes=_stage_bytes(prepared),
    )


def _stage_bytes(prepared: Prepared) -> tuple[int, ...] | None:
    """Weights, gradients, one number of state per weight, and what the method keeps of the micro-batches in flight."""
    recipe, sizes = prepared.recipe, prepared.pipeline.layout.sizes
    if recipe.method not in all_schedules():
        return None
    shape, autocast = prepared.preprocessing.input_size, autocast_type(recipe)
    profile = measure(prepared.model, recipe.batch_size, shape, repeats=1, autocast=autocast, fed=torch.uint8)
    k = recipe.accumulation_steps
    found = forecast(profile, recipe.method, len(sizes), Cluster(), micro_batches=k, split=sizes)
    return tuple(memory.total for memory in found.memory)


def _per_class(data: ImageDataset) -> dict[str, int]:
    counts = class_counts(data.labels(), max(data.num_classes, len(data.class_names)))
    return dict(zip(data.class_names, counts.tolist(), strict=False))


def _count(per_class: dict[str, int]) -> str:
    """Images of a split, and of its classes."""
    total = f"{sum(per_class.values()):,} images of {len(per_class)} classes"
    if len(per_class) <= _FEW:
        return f"{total}: {', '.join(f'{name} {n}' for name, n in per_class.items())}"
    least, most = min(per_class, key=per_class.__getitem__), max(per_class, key=per_class.__getitem__)
    return f"{total}, from {per_class[least]} ({least}) to {per_class[most]} ({most})"


def _number(updates: float) -> str:
    return counted(int(updates), "update") if updates.is_integer() else f"{updates:.2f} updates"
