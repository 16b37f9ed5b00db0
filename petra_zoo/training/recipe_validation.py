"""Trying recipes out: everything a run needs is built, on small generated files, and two updates are made.

The network and its input have their real size; a micro-batch has two images, and the learning rate stays the recipe's.
"""

from __future__ import annotations

import fnmatch
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from petra_zoo.data.generated_files import write_dataset
from petra_zoo.data.loader import ImageLoader
from petra_zoo.device import choose_device
from petra_zoo.errors import Failure, UserError
from petra_zoo.petra import Output, Pipeline, World
from petra_zoo.settings.recipe import Recipe
from petra_zoo.settings.recipe_files import list_recipes, load_recipe
from petra_zoo.training.build import build_loaders, build_model, build_pipeline, data_config, memory_format, open_data

UPDATES = 2
_IMAGES = 2  # per micro-batch


@dataclass(frozen=True)
class Verdict:
    """What became of a recipe: `reason` says in one line why it failed, and is None where it did not."""

    recipe: str
    reason: str | None
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether everything could be built and trained."""
        return self.reason is None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "ok": self.ok}


def validate_recipes(pattern: str = "*", overrides: Sequence[str] = ()) -> Iterator[Verdict]:
    """Tries all recipes whose names match, or one `.yaml` file; gives each verdict as soon as it is known.

    Raises:
        UserError: No recipe matches.
    """
    names = [pattern] if pattern.endswith((".yaml", ".yml")) else fnmatch.filter(list_recipes(), pattern)
    if not names:
        raise UserError(f"no recipe matches {pattern!r}; petra-zoo recipes ls shows all, wildcards are * and ?")
    return (_verdict(name, overrides) for name in names)


def _verdict(name: str, overrides: Sequence[str]) -> Verdict:
    started = time.perf_counter()
    reason = None
    try:
        try_recipe(load_recipe(name, overrides))
    except (UserError, Failure) as error:
        reason = str(error)
    except Exception as error:  # one recipe's bug must not keep the others from being tried
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return Verdict(name, reason, time.perf_counter() - started)


def try_recipe(recipe: Recipe) -> None:
    """Builds model, data, optimizer and schedule as a run would, makes two updates and evaluates a batch.

    Nothing is downloaded, and nothing is written that stays. The recipe's own data is read only where its format cannot
    be generated (timm's `torch/...`, `hfds/...`). Pretrained weights are not loaded.

    Raises:
        UserError: The recipe cannot be built, or what came out is not what training needs.
    """
    with tempfile.TemporaryDirectory() as folder:
        generated = write_dataset(recipe.dataset, Path(folder), recipe.num_classes)
        small = recipe.model_copy(
            update={
                "data_dir": Path(folder) if generated else recipe.data_dir,
                "dataset_download": False,
                "pretrained": False,
                "batch_size": _IMAGES,
                "validation_batch_size": _IMAGES,
                "workers": 0,
                "lr": recipe.learning_rate,
                "lr_base": None,
            }
        )
        train_data, val_data = open_data(small, verify=not generated)
        device = choose_device(small.device)
        world = World(device=device)
        model = build_model(small, train_data, device)
        config = data_config(small, train_data, model)
        train_loader, val_loader = build_loaders(small, train_data, val_data, config, world)
        pipeline = build_pipeline(small, model, len(train_loader), config, world)
        before = [p.detach().clone() for p in model.parameters()]
        outputs = _train(small, pipeline, train_loader, device)
        _check_training(small, pipeline, before, outputs)
        images, labels = next(iter(val_loader))
        images = images.to(device, memory_format=memory_format(small))
        ((logits, _),) = pipeline.predict([(images, labels.to(device))])
    if logits.shape != (len(images), model.num_classes) or not logits.isfinite().all():
        raise UserError(f"evaluation gave {list(logits.shape)} logits that are wrong in number, or not finite")


def _train(recipe: Recipe, pipeline: Pipeline, loader: ImageLoader, device: torch.device) -> list[Output]:
    """Feeds the micro-batches of two updates, epoch after epoch where one is too short, and drains the pipeline."""
    outputs: list[Output] = []
    epoch = 0
    while True:
        loader.set_epoch(epoch)
        for images, labels in loader:
            if pipeline.fed == UPDATES * recipe.accumulation_steps:
                outputs += pipeline.drain()
                return [output for output in outputs if output.loss is not None]
            images = images.to(device, memory_format=memory_format(recipe))
            outputs.append(pipeline.step(images, labels.to(device)))
        epoch += 1


def _check_training(recipe: Recipe, pipeline: Pipeline, before: list[torch.Tensor], outputs: list[Output]) -> None:
    losses = [float(output.loss) for output in outputs if output.loss is not None]
    if len(losses) != UPDATES * recipe.accumulation_steps:
        raise UserError(f"{len(losses)} losses came out of {UPDATES * recipe.accumulation_steps} micro-batches")
    if not all(torch.tensor(losses).isfinite()):
        raise UserError(f"the loss is not finite: {losses}")
    then = {id(p): old for p, old in zip(pipeline.model.parameters(), before, strict=True)}
    for j, stage in enumerate(pipeline.stages):
        own = [p for group in stage.parameters for p in group if id(p) in then]
        if own and all(torch.equal(p, then[id(p)]) for p in own):
            raise UserError(f"no parameter of stage {j} changed in {UPDATES} updates: see lr and warmup_epochs")
        if not all(p.isfinite().all() for p in own):
            raise UserError(f"a parameter of stage {j} is not finite after {UPDATES} updates: see lr")
