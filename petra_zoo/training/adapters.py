"""Low-rank adapters (LoRA, Hu et al., arXiv 2106.09685) by the library `peft`: where they go, and how they are merged.

An adapted layer computes W x + (alpha / rank) B A x with W as it was. It stands in its block, so that a reversible run
recomputes it with everything else. What is saved of a network has W + (alpha / rank) B A in W's place: it is the
network that it was, under the same names, for timm and for whoever does not have `peft`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from typing import Protocol, TypeGuard

import torch
from torch import nn

from petra_zoo.errors import UserError
from petra_zoo.models.classifier import Classifier, heads_of
from petra_zoo.models.run_buffers import RunBuffers
from petra_zoo.settings.recipe import Recipe


def add_adapters(recipe: Recipe, model: Classifier, image_size: int) -> None:
    """Gives layers of a model adapters, which alone are trained from now on, beside the classifier.

    An adapter begins without effect. Its weights are drawn from the global generator.

    Args:
        recipe: with a `lora_rank`.
        model: its blocks' layers are replaced, in place.
        image_size: that the model takes.

    Raises:
        UserError: `peft` is not installed, or there is no such layer, or none that can have an adapter.
    """
    if find_spec("peft") is None:
        raise UserError("lora_rank needs peft: pip install 'petra-zoo[lora]'")
    from peft import LoraConfig, inject_adapter_in_model  # with transformers behind it: only where it is used

    names = _layers_to_adapt(recipe, model, image_size)
    config = LoraConfig(
        r=recipe.lora_rank,
        lora_alpha=recipe.lora_alpha or recipe.lora_rank,
        lora_dropout=recipe.lora_dropout,
        target_modules="|".join(map(re.escape, names)),
    )
    inject_adapter_in_model(config, model)  # freezes everything else
    for head in heads_of(model):
        head.requires_grad_(True)


@torch.no_grad()
def merge_adapters(model: nn.Module) -> None:
    """Puts every adapter into the weights of its layer, and the layer back into its place."""
    for name, layer in adapted_layers(model):
        layer.merge()
        model.set_submodule(name, layer.get_base_layer())
    vars(model).pop("peft_config", None)


def adapted_layers(model: nn.Module) -> list[tuple[str, _Adapted]]:
    """The layers that have an adapter, by name; none where the model was given none, with or without `peft`."""
    return [(name, module) for name, module in model.named_modules() if _is_adapted(module)]


class _Adapted(Protocol):
    """What of peft's layers is used here."""

    def merge(self) -> None: ...

    def get_base_layer(self) -> nn.Module: ...


def _is_adapted(module: nn.Module) -> TypeGuard[_Adapted]:
    return type(module).__module__.startswith("peft.") and hasattr(module, "get_base_layer")


def _layers_to_adapt(recipe: Recipe, model: Classifier, image_size: int) -> list[str]:
    """Names of layers: those asked for, else all in reversible blocks."""
    asked, heads = recipe.lora_targets, {module for head in heads_of(model) for module in head.modules()}
    possible = {name: module for name, module in _adaptable(model) if module not in heads}
    called = _called(possible.values(), model, (1, recipe.in_chans, image_size, image_size))
    if asked is None:
        blocks = {module for run in model.modules() if isinstance(run, RunBuffers) for module in run.modules()}
        found = [name for name, module in possible.items() if module in blocks and module in called]
        if not found:
            raise UserError(f"lora_rank: {recipe.model} has no layer in reversible blocks that can have an adapter; "
                            "expected lora_targets=[NAME, ...]")  # fmt: skip
        return found
    found = []
    for target in asked:
        ends = [name for name in possible if f".{name}".endswith(f".{target}")]
        if not ends:
            raise UserError(
                f"lora_targets: {recipe.model} has no linear layer or ungrouped convolution {target!r} in front of its "
                f"classifier; nearest: {_nearest(target, possible)}"
            )
        if aside := [name for name in ends if possible[name] not in called]:
            raise UserError(
                f"lora_targets: {recipe.model} reads the weight of {aside[0]} without calling the layer, so an adapter "
                f"would have no part in it: leave {target!r} out"
            )
        found += ends
    return list(dict.fromkeys(found))


def _adaptable(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Layers that an adapter can be merged into: of torch's own types, for a subclass may do more with its weight."""
    for name, module in model.named_modules():
        if type(module) is nn.Linear or (type(module) is nn.Conv2d and module.groups == 1):
            yield name, module


def _called(layers: Iterable[nn.Module], model: nn.Module, shape: tuple[int, ...]) -> set[nn.Module]:
    """Those of a model's layers that a forward calls: some networks hand a layer's weight to a function instead."""
    called: set[nn.Module] = set()
    handles = [layer.register_forward_hook(lambda module, *_: called.add(module)) for layer in layers]
    was_training = model.training
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(shape))
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    return called


def _nearest(target: str, names: Iterable[str]) -> str:
    ends = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
    return ", ".join(difflib.get_close_matches(target, ends, n=4, cutoff=0.3) or ends[:6])
