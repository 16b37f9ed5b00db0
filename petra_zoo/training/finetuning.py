"""Starting from a trained checkpoint: where the weights come from, what becomes of the head, and what stays frozen."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

import torch
from timm.models import group_parameters
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from petra_zoo.data.labels import all_named, names_of, positions
from petra_zoo.errors import UserError
from petra_zoo.models.classifier import Classifier, heads_of
from petra_zoo.settings.recipe import Recipe
from petra_zoo.training.adapters import adapted_layers, add_adapters

BACKBONE = "backbone"


def checkpoint_name(recipe: Recipe) -> str:
    """What `timm.create_model` is asked for: the recipe's model, or the checkpoint that `pretrained` names.

    Raises:
        UserError: `pretrained` looks like a place, but there is none.
    """
    source = recipe.pretrained
    if isinstance(source, bool):
        return recipe.model
    if Path(source).is_dir():
        return f"local-dir:{source}"
    if source.startswith(("hf-hub:", "hf_hub:")):
        return source
    if source.startswith("local-dir:") and Path(source.removeprefix("local-dir:")).is_dir():
        return source
    if "/" in source or source.startswith("local-dir:"):
        raise UserError(f"there is no directory {source!r}; for a model on the Hub write pretrained=hf-hub:{source}")
    architecture = recipe.model.split(".", 1)[0]
    return f"{architecture}.{source.removeprefix(f'{architecture}.')}"


def check_architecture(recipe: Recipe, model: Classifier) -> None:
    """The recipe must say which network it trains: `plan`, the run's name and its checkpoints go by it.

    Raises:
        UserError: the checkpoint is of another network.
    """
    expected, found = recipe.model.split(".", 1)[0], model.pretrained_cfg["architecture"]
    if expected != found:
        raise UserError(
            f"{recipe.pretrained} is a {found}, but the recipe says model={recipe.model}: set model={found}"
        )


@torch.no_grad()
def arrange_head(model: Classifier, class_names: Sequence[str]) -> None:
    """Puts the classifier's rows into the order of `class_names`, in place, where the checkpoint's head was kept.

    Classes that the checkpoint knows by name get their rows; those that it does not know get the rows that are left. A
    checkpoint without names, or one that knows none of these, keeps its rows as they are.

    Args:
        model: with the checkpoint's `pretrained_cfg`; a head that timm has replaced (another number of classes) is left
            alone.
        class_names: of the data, in its order; classes beyond are numbered.
    """
    known = names_of(model)
    if known is None or model.pretrained_cfg["num_classes"] != model.num_classes:
        return
    found = positions(all_named(class_names, model.num_classes), known)
    left = iter(sorted(set(range(len(known))) - set(found)))
    rows = [next(left) if row is None else row for row in found]
    if rows == list(range(len(rows))) or all(row is None for row in found):
        return
    for parameter in (p for head in heads_of(model) for p in head.parameters()):
        parameter.copy_(parameter[rows])


def freeze(recipe: Recipe, model: Classifier, image_size: int) -> None:
    """Takes the recipe's frozen parts out of training: parameters stay, batch norms use their running statistics.

    Args:
        recipe: says what is trained.
        model: is changed in place; layers with adapters take the place of its own.
        image_size: that it takes.

    Raises:
        UserError: the model has no such part, or nothing is left to train.
    """
    if recipe.freeze == BACKBONE:
        head = {id(p) for module in heads_of(model) for p in module.parameters()}
        for p in model.parameters():
            p.requires_grad_(id(p) in head)
        keep_statistics(model)
    elif recipe.freeze is not None:
        for name in [recipe.freeze] if isinstance(recipe.freeze, str) else recipe.freeze:
            part = _part(model, name)
            part.requires_grad_(False)
            keep_statistics(part)
    elif recipe.train_last is not None:
        _freeze_all_but(model, recipe.train_last)
    elif recipe.lora_rank is not None:
        add_adapters(recipe, model, image_size)
        keep_statistics(model)
    if recipe.freeze_bn:
        for norm in keep_statistics(model):
            norm.requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError(f"freeze={recipe.freeze} leaves nothing to train")


def _freeze_all_but(model: Classifier, last: int) -> None:
    """Freezes all but the classifier and so many layers in front of it, counted as timm's layer decay does.

    Raises:
        UserError: the model does not say what its layers are, or has no more than these.
    """
    matcher: Callable[..., Mapping[str, str]] | None = getattr(model, "group_matcher", None)
    if matcher is None:
        raise UserError(f"train_last={last}: {type(model).__name__} has no group_matcher that says what its layers are")
    layers = list(group_parameters(model, matcher(coarse=False)).values())  # the stem's first, the classifier's last
    if last > len(layers) - 2:
        raise UserError(f"train_last={last}: the model has {len(layers) - 2} layers between its stem and its "
                        "classifier; to train all of it, leave train_last out")  # fmt: skip
    trained = {name for names in layers[-1 - last :] for name in names}
    for name, p in model.named_parameters():
        p.requires_grad_(name in trained)
    for module in model.modules():
        if isinstance(module, _BatchNorm) and not any(p.requires_grad for p in module.parameters()):
            keep_statistics(module)


def keep_statistics(module: nn.Module) -> list[nn.Module]:
    """Makes batch norms stay in eval mode when the model is put in train mode; gives them.

    They normalise with their running statistics, in a forward and in its recomputation alike, and never change them.
    """
    norms: list[nn.Module] = [m for m in module.modules() if isinstance(m, _BatchNorm)]
    for norm in norms:
        if not isinstance(norm, _StaysInEval):
            # mypy looks for a class's hash in its instances.
            norm.__class__ = _frozen_kind(type(norm))  # type: ignore[arg-type]
        norm.eval()
    return norms


def is_frozen_norm(module: nn.Module) -> bool:
    """Whether `keep_statistics` made a batch norm stay in eval mode."""
    return isinstance(module, _StaysInEval)


def start_lines(recipe: Recipe, model: Classifier, class_names: list[str]) -> Iterator[str]:
    """What a person should know of where training starts: the checkpoint, its head, and what is frozen."""
    if recipe.pretrained:
        before, now = model.pretrained_cfg["num_classes"], model.num_classes
        name = recipe.pretrained if isinstance(recipe.pretrained, str) else f"{recipe.model}'s pretrained weights"
        labels = names_of(model)
        if before != now:
            head = f"head replaced: {before} classes become {now}"
        elif labels is None:
            head = f"head kept: {now} classes, matched by number, as the checkpoint does not name them"
        elif len(class_names) == now and None in positions(class_names, labels):
            head = f"head kept: {now} classes too, but under other names"
        else:
            head = f"head kept: {now} classes"
        yield f"starting from {name}; {head}"
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    if frozen:
        total = sum(p.numel() for p in model.parameters())
        norms = sum(isinstance(m, _StaysInEval) for m in model.modules())
        also = f"; {norms} batch norms use their running statistics" if norms else ""
        if adapted := adapted_layers(model):
            also += f"; adapters of rank {recipe.lora_rank} in {len(adapted)} layers"
        yield f"frozen: {frozen:,} of {total:,} parameters{also}"


class _StaysInEval:
    """Marks the classes of `_frozen_kind`."""


@cache
def _frozen_kind(kind: type[nn.Module]) -> type[nn.Module]:
    def train(self: nn.Module, mode: bool = True) -> nn.Module:
        kind.train(self, False)
        return self

    return type(f"Frozen{kind.__name__}", (_StaysInEval, kind), {"train": train})


def _part(model: nn.Module, name: str) -> nn.Module:
    parts = dict(model.named_modules())
    if name not in parts or not name:
        outer = [BACKBONE, *(part for part in parts if part and part.count(".") < 2)]
        near = difflib.get_close_matches(name, outer, n=3, cutoff=0.4) or [BACKBONE, *dict(model.named_children())]
        raise UserError(f"freeze={name}: the model has no such part; nearest: {', '.join(near)}")
    return parts[name]
