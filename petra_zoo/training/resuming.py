"""What a run goes on from: the run directory that is there, or a checkpoint by its path.

One process looks, and all do what it has found.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from petra_zoo.checkpoints.load import LAST
from petra_zoo.checkpoints.packing import CheckpointError
from petra_zoo.checkpoints.provenance import ENVIRONMENT, EVALUATION
from petra_zoo.checkpoints.store import CHECKPOINTS, RunCheckpoint, Store, checkpoints_in, verified
from petra_zoo.errors import UserError
from petra_zoo.evaluation.scores import Scores
from petra_zoo.files import check_free
from petra_zoo.settings.recipe import Recipe
from petra_zoo.settings.recipe_files import recipe_settings
from petra_zoo.strict_json import Json, JsonObject, to_json
from petra_zoo.training.log_writers import TENSORBOARD, WANDB, WANDB_ID
from petra_zoo.training.run_directory import LOGS, MODEL, PROFILE, RECIPE, SAVING
from petra_zoo.training.run_lock import LOCK, held_by_this_run
from petra_zoo.wording import counted

_LAUNCH = ".launch"  # in a run directory: which launch has made it
# Launching, logging, output and workers: they decide no bit of a run. Nor does what is done where it cannot go on.
FREE = {
    "balance",
    "checkpoint_every",
    "cuda_graphs",
    "dataset_download",
    "device",
    "device_speed",
    "drift_every",
    "drift_limit",
    "keep_best",
    "keep_last",
    "link_timeout",
    "log_interval",
    "log_to",
    "on_divergence",
    "on_nonfinite",
    "output",
    "profile",
    "workers",
}

# What is saved is of these.
FIXED = {
    "data_parallel",
    "freeze",
    "freeze_bn",
    "layer_decay",
    "lora_rank",
    "lora_targets",
    "method",
    "model",
    "opt",
    "opt_kwargs",
    "split",
    "stages",
    "train_last",
}
# Of what micro-batches in flight are made, and what orders an epoch: these cannot change in the middle of either.
_FORM = ("img_size", "in_chans", "num_classes", "kd_model_name")
_SOFT = ("mixup", "cutmix", "smoothing")
_ORDER = {"seed", "sampler"}
# What makes another loss of the same network.
LOSS = {
    "class_weights",
    "cutmix",
    "distill_loss_weight",
    "kd_model_name",
    "kd_temperature",
    "loss",
    "mixup",
    "smoothing",
    "task_loss_weight",
}


# What ends a run: with another one, a finished run may go on.
LENGTH = {"epochs", "max_updates", "patience", "cooldown_epochs", "warmup_prefix"}


@dataclass(frozen=True)
class Start:
    """How a run begins.

    Attributes:
        directory: of a run that goes on in its own; None: a new one.
        checkpoint: what it goes on from.
        finished: nothing is left to do.
        changed: settings that differ from those that it was saved with, and decide bits.
    """

    directory: Path | None = None
    checkpoint: RunCheckpoint | None = None
    finished: bool = False
    changed: frozenset[str] = frozenset()


def find_start(recipe: Recipe, resume: str, allow_change: Sequence[str] = ()) -> Start:
    """Looks for what a run goes on from.

    Args:
        recipe: of the run.
        resume: `auto`: the run in its output directory; the path of a run or of a checkpoint; `never`.
        allow_change: settings that may differ from those of the run that goes on.

    Raises:
        UserError: the directory holds something else, settings have changed, or the checkpoint of a path is bad.
    """
    if unknown := [key for key in allow_change if key not in Recipe.model_fields]:
        raise UserError(f"--allow-change {unknown[0]}: there is no such setting")
    if fixed := sorted(FIXED & set(allow_change)):
        raise UserError(f"--allow-change {fixed[0]}: what is saved is of this {fixed[0]}, and of no other")
    if resume not in ("auto", "never"):
        return _by_path(Path(resume), recipe, allow_change)
    directory = recipe.output
    if directory is None:
        return Start()
    if resume == "never" or not (directory / RECIPE).exists():
        check_free(directory, "output=DIR")
        return Start()
    with held_by_this_run(directory):
        pass
    if checkpoint := Store(directory / CHECKPOINTS).newest_good():
        changed = check_unchanged(checkpoint.path, checkpoint.manifest.recipe, recipe, allow_change)
        done = checkpoint.manifest.finished and not changed & LENGTH
        return Start(directory, checkpoint, finished=done, changed=frozenset(changed))
    if (directory / EVALUATION).exists():  # saved nothing to go on from, but it is finished
        if check_unchanged(directory, recipe_settings(str(directory / RECIPE)), recipe, allow_change) & LENGTH:
            raise UserError(f"{directory} is finished and has no checkpoint to go on from: choose another output=DIR")
        return Start(directory, finished=True)
    if not _failed_to_start(directory, recipe):
        check_free(directory, "output=DIR")
    for name in LOGS:
        (directory / name).unlink(missing_ok=True)
    return Start(directory)


def check_unchanged(
    where: Path, then: Mapping[str, Json], recipe: Recipe, allow_change: Sequence[str] = ()
) -> set[str]:
    """Refuses to go on with other settings; gives those that may and do differ.

    Args:
        where: what it would go on from.
        then: its settings.
        recipe: today's.
        allow_change: settings that may differ.

    Raises:
        UserError: names them, what they were and what they are.
    """
    now = recipe.model_dump(mode="json")
    differing = {key for key in now if key not in FREE and key in then and not _same(key, then[key], now[key])}
    if refused := sorted(differing - set(allow_change)):
        words = ", ".join(f"{key} was {_shown(then[key])} and is {_shown(now[key])}" for key in refused)
        allowed = " ".join(f"--allow-change {key}" for key in refused)
        another = "choose another output=DIR"
        add = f"or {another}" if FIXED & set(refused) else f"{another}, or add {allowed}"
        raise UserError(f"{where} is of a run with other settings: {words}; take them back, {add}")
    return differing


def check_middle(start: Start, recipe: Recipe, *, in_flight: int, in_epoch: bool) -> None:
    """Refuses settings that may change, but not where a run was left.

    Args:
        start: what it goes on from.
        recipe: today's.
        in_flight: how many micro-batches were saved with it.
        in_epoch: whether an epoch was left in the middle.

    Raises:
        UserError: names the first.
    """
    assert start.checkpoint
    then = start.checkpoint.manifest.recipe
    now = recipe.model_dump(mode="json")
    another = [key for key in _FORM if key in start.changed]
    soft = [key for key in _SOFT if key in start.changed]
    if soft and any(map(then.get, _SOFT)) != any(map(now.get, _SOFT)):
        another += soft
    if another and in_flight:
        raise UserError(
            f"{start.checkpoint.path} has {counted(in_flight, 'micro-batch')} in flight, made with {another[0]} as "
            "it was: take it back, or start a run from its weights (pretrained=DIR)"
        )
    moving, epoch = then.get("coupling_epochs"), start.checkpoint.manifest.epoch
    if recipe.coupling_epochs == 0 and isinstance(moving, int) and 0 < epoch < moving:
        raise UserError(
            f"{start.checkpoint.path} has couplings on their way to 1 (coupling_epochs={moving}), which 0 would leave "
            "there: take it back, or give a smaller number"
        )
    if in_epoch and (order := sorted(_ORDER & start.changed)):
        raise UserError(
            f"{start.checkpoint.path} is in the middle of an epoch, whose order {order[0]} decides: take it back, or "
            "--resume a checkpoint from an epoch's end"
        )


def adopt(start: Start) -> None:
    """Sets what of a run's process decides bits: the number of threads."""
    if "threads" in start.changed:
        return
    if start.checkpoint and start.checkpoint.manifest.threads != torch.get_num_threads():
        torch.set_num_threads(max(1, min(start.checkpoint.manifest.threads, 4096)))


def finished_result(directory: Path) -> tuple[Scores, float, str]:
    """What a finished run has left: the evaluation of its model, the seconds of training, and why it ended.

    Raises:
        UserError: its records cannot be read.
    """
    try:
        record, environment = (_read(directory / name) for name in (EVALUATION, ENVIRONMENT))
        top1, top5, loss = (float(str(record[key])) for key in ("top1", "top5", "loss"))
        scores = Scores(top1, top5, loss, int(str(record["images"])), torch.zeros(0, 0, dtype=torch.int64))
        return scores, float(str(environment["training_seconds"])), str(environment.get("ended", ""))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{directory} is finished, but its {EVALUATION} cannot be read: {error}") from error


def _by_path(path: Path, recipe: Recipe, allow_change: Sequence[str]) -> Start:
    """A checkpoint that the user has named: where it is bad, nothing else is taken in its place."""
    newest = checkpoints_in(path)[-1]
    try:
        checkpoint = verified(newest)
    except CheckpointError as error:
        raise UserError(f"--resume {path}: {error}") from error
    changed = frozenset(check_unchanged(checkpoint.path, checkpoint.manifest.recipe, recipe, allow_change))
    run = newest.resolve().parent.parent
    if recipe.output is None or recipe.output.resolve() == run:
        return Start(recipe.output or run, checkpoint, changed=changed)
    check_free(recipe.output, "output=DIR")
    return Start(None, checkpoint, changed=changed)


def _failed_to_start(directory: Path, recipe: Recipe) -> bool:
    """Whether it holds a run that ended before anything was saved: the corrected one begins anew.

    One that ended between its first model and its first checkpoint makes that model once more, by the same settings.
    """
    its_own = {RECIPE, PROFILE, LOCK, _LAUNCH, *LOGS, TENSORBOARD, WANDB, WANDB_ID}
    with suppress(UserError):
        check_unchanged(directory, recipe_settings(str(directory / RECIPE)), recipe)
        its_own |= {MODEL, "config.json", LAST}
    others = [path for path in directory.iterdir() if path.name not in its_own and not path.name.startswith(SAVING)]
    if not all(map(_empty, others)):
        return False
    try:
        return recipe_settings(str(directory / RECIPE)).keys() >= Recipe.model_fields.keys()  # no user writes them all
    except UserError:
        return (directory / RECIPE).stat().st_size == 0  # claimed, and no more


def _empty(path: Path) -> bool:
    """Whether it is the folder of checkpoints without one in it."""
    return path.name == CHECKPOINTS and not Store(path).names()


def _read(path: Path) -> Mapping[str, Json]:
    if path.stat().st_size > 1 << 20:
        raise ValueError(f"{path.name} has {path.stat().st_size:,} bytes")
    found: JsonObject = json.loads(path.read_text(encoding="utf-8"))
    return found


def _same(key: str, a: Json, b: Json) -> bool:
    if key == "data_dir" and isinstance(a, str) and isinstance(b, str):
        return Path(a).resolve() == Path(b).resolve()
    return to_json(a, sort_keys=True) == to_json(b, sort_keys=True)


def _shown(value: Json) -> str:
    text = to_json(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def with_the_launchs_directory(recipe: Recipe) -> Recipe:
    """The recipe; where the launcher has started its processes again, with the directory of the first time.

    The default directory carries the time: without this, a restart would begin a run of its own.
    """
    launch = _launch()
    if recipe.output is not None or launch is None or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return recipe
    found = [path for path in Path("runs").glob(f"*/{_LAUNCH}") if path.read_text(encoding="utf-8") == launch]
    if not found:
        return recipe
    newest = max(found, key=lambda path: path.stat().st_mtime_ns)  # launches may share a name, as torchrun's --rdzv-id
    return recipe.model_copy(update={"output": newest.parent})


def remember_launch(directory: Path) -> None:
    """Leaves in a run's directory which launch it is of, where there is a launcher that may start it again."""
    if launch := _launch():
        (directory / _LAUNCH).write_text(launch, encoding="utf-8")


def forget_launch(directory: Path) -> None:
    """At the end of a run: no later launch of that name is to take it for its own."""
    (directory / _LAUNCH).unlink(missing_ok=True)


def _launch() -> str | None:
    found = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return None if found == "none" else found
