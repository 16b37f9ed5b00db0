"""Trying recipes out: everything a run needs is built, on small generated files, and two updates are made.

The network and its input have their real size; a micro-batch has two images, and the learning rate stays the recipe's.
"""

from __future__ import annotations

import fnmatch
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from petra_zoo.data.generated_files import write_dataset
from petra_zoo.device import choose_device
from petra_zoo.errors import Failure, UserError
from petra_zoo.petra import Output, World
from petra_zoo.settings.recipe import Recipe
from petra_zoo.settings.recipe_files import list_recipes, load_recipe
from petra_zoo.strict_json import JsonObject
from petra_zoo.training.build import build_loaders, check_batches, check_norms, open_data
from petra_zoo.training.engine import check_processes
from petra_zoo.training.preparation import Prepared, prepare
from petra_zoo.training.progress import Reporter
from petra_zoo.training.run import Run
from petra_zoo.training.synchronized_norms import require_cuda
from petra_zoo.training.teachers import untrained_teacher
from petra_zoo.training.threads import threads_restored

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

    def as_dict(self) -> JsonObject:
        """For JSON."""
        return {**asdict(self), "ok": self.ok}


def validate_recipes(
    pattern: str = "*", overrides: Sequence[str] = (), processes: int | None = None
) -> Iterator[Verdict]:
    """Tries all recipes whose names match, or one `.yaml` file; gives each verdict as soon as it is known.

    Args:
        pattern: wildcards, or a file.
        overrides: `KEY=VALUE` each.
        processes: how many are to be launched; see `try_recipe`.

    Raises:
        UserError: No recipe matches.
    """
    names = [pattern] if pattern.endswith((".yaml", ".yml")) else fnmatch.filter(list_recipes(), pattern)
    if not names:
        raise UserError(f"no recipe matches {pattern!r}; petra-zoo recipes ls shows all, wildcards are * and ?")
    return (_verdict(name, overrides, processes) for name in names)


def _verdict(name: str, overrides: Sequence[str], processes: int | None) -> Verdict:
    started = time.perf_counter()
    reason = None
    try:
        try_recipe(load_recipe(name, overrides), processes)
    except (UserError, Failure) as error:
        reason = str(error)
    except Exception as error:  # one recipe's bug must not keep the others from being tried
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return Verdict(name, reason, time.perf_counter() - started)


@threads_restored()
def try_recipe(recipe: Recipe, processes: int | None = None) -> None:
    """Prepares a run as `train` does, makes two updates, moves the couplings in between, and evaluates a batch.

    Nothing is downloaded, and nothing is written that stays. The recipe's own data is read only where its format cannot
    be generated (timm's `torch/...`, `hfds/...`, registered ones). Neither the network nor a teacher from timm gets its
    pretrained weights; a teacher from the Hub must have been there before.

    Args:
        recipe: the settings.
        processes: how many are to be launched; default: as many as `device_speed` and `data_parallel` say. All is tried
            in one process; whether the stages can be spread over several is looked at.

    Raises:
        UserError: The recipe cannot be built, or what came out is not what training needs.
    """
    device = choose_device(recipe.device)
    if recipe.sync_bn and recipe.data_parallel > 1:
        require_cuda(device)
    teacher = untrained_teacher(recipe, device)
    with tempfile.TemporaryDirectory() as folder:
        classes = recipe.num_classes or (teacher.num_classes if teacher else None)
        generated = write_dataset(recipe.dataset, Path(folder), classes)
        small = _shrunk(recipe, Path(folder) if generated else recipe.data_dir)
        data = open_data(small, verify=not generated)
        for split in data if generated else ():
            split.named = False  # made-up names are none
        prepared = prepare(small, world=World(device=device), data=data, teacher_from=lambda *_: teacher)
        if not generated:  # else there is no knowing how many images there are
            whole = recipe.model_copy(update={"workers": 0})
            replicas = replace(prepared.world, replicas=recipe.data_parallel)
            check_batches(whole, build_loaders(whole, *data, prepared.preprocessing, replicas)[0])
        check_norms(recipe, prepared.model, prepared.preprocessing)
        check_processes(recipe, prepared.model, prepared.preprocessing, processes)
        _train(prepared)
        _evaluate(prepared)


def _shrunk(recipe: Recipe, data_dir: Path | None) -> Recipe:
    """The recipe for one process and few images."""
    return recipe.model_copy(
        update={
            "data_dir": data_dir,
            "dataset_download": False,
            "pretrained": False,
            "batch_size": _IMAGES,
            "update_size": None,
            "max_delay": None,
            "accumulation_steps": min(recipe.accumulation_steps, 2),  # more of them are more of the same
            "validation_batch_size": _IMAGES,
            "workers": 0,
            "lr": recipe.learning_rate,
            "lr_base": None,
            "device_speed": None,
        }
    )


def _train(prepared: Prepared) -> None:
    """Feeds the micro-batches of two updates, epoch after epoch where one is too short, and drains the pipeline."""
    run, k = Run(prepared, Reporter(quiet=True)), prepared.recipe.accumulation_steps
    prepared.model.train()
    before = [p.detach().clone() for p in prepared.model.parameters()]
    outputs: list[Output] = []
    for number, (images, labels) in zip(range(UPDATES * k), prepared.endless(), strict=False):
        if number == k and prepared.schedule:
            outputs += run.drain()
            before = [p.detach().clone() for p in prepared.model.parameters()]
            run.move_couplings(prepared.recipe.coupling_epochs)  # the last of them, to 1
        outputs.append(run.step(images, labels))
    outputs += run.drain()
    _check_training(prepared, before, [float(output.loss) for output in outputs if output.loss is not None])


def _check_training(prepared: Prepared, before: list[Tensor], losses: list[float]) -> None:
    wanted = UPDATES * prepared.recipe.accumulation_steps
    if len(losses) != wanted:
        raise UserError(f"{len(losses)} losses came out of {wanted} micro-batches")
    if not all(torch.tensor(losses).isfinite()):
        raise UserError(f"the loss is not finite: {losses}")
    then = {id(p): old for p, old in zip(prepared.model.parameters(), before, strict=True)}
    # A block's last norm begins at zero; where it is frozen and its trained weights are not here, none of it learns.
    may_stand_still = prepared.recipe.freeze_bn
    for j, stage in enumerate(prepared.pipeline.stages):
        own = [p for group in stage.parameters for p in group if id(p) in then]
        if own and not may_stand_still and all(torch.equal(p, then[id(p)]) for p in own):
            raise UserError(f"no parameter of stage {j} changed in {UPDATES} updates: see lr and warmup_epochs")
        if not all(p.isfinite().all() for p in own):
            raise UserError(f"a parameter of stage {j} is not finite after {UPDATES} updates: see lr")


def _evaluate(prepared: Prepared) -> None:
    """One batch through the stages, as a validation does it: of the moving average, where there is one."""
    model = prepared.ema.module if prepared.ema else prepared.model
    images, labels = next(prepared.batches(prepared.val_loader))
    model.eval()
    ((logits, _),) = prepared.pipeline.predict([(images, labels)], 1, model)
    if logits.shape != (len(labels), prepared.model.num_classes) or not logits.isfinite().all():
        raise UserError(f"evaluation gave {list(logits.shape)} logits that are wrong in number, or not finite")
