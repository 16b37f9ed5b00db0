"""Losses by name: what a recipe's `loss` may say.

Labels are class indices [B], or probabilities [B, classes] where images are mixed, labels smoothed (by the loader, so
a loss has nothing to smooth) or a teacher is distilled from.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Protocol, TypeGuard

import torch
import torch.nn.functional as F
from timm.loss import BinaryCrossEntropy
from torch import Tensor

from petra_zoo.data.balance import balanced_weights
from petra_zoo.data.image_dataset import ImageDataset
from petra_zoo.errors import UserError
from petra_zoo.petra.part import Loss
from petra_zoo.registry import Registry
from petra_zoo.settings.recipe import Recipe

LOSSES: Registry[Loss] = Registry("loss", "petra_zoo.losses")


def register_loss(name: str) -> Callable[[Loss], Loss]:
    """Makes a loss known by name, to recipes.

    What is decorated takes logits [B, classes] and labels ([B] or [B, classes], see above) and gives their mean loss,
    a 0-d tensor. It runs where the head is (with `method=local` in every stage), has no parameters, and draws nothing.
    One that has a parameter `weight` is given a weight per class [classes] there, where a recipe has `class_weights`.

    Raises:
        UserError: there is one of that name.

    Example:
        >>> @register_loss("squared")
        ... def squared(logits, labels):
        ...     wanted = labels if labels.ndim == 2 else F.one_hot(labels, logits.shape[1])
        ...     return (logits.softmax(1) - wanted).square().sum(1).mean()
    """

    def register(loss: Loss) -> Loss:
        LOSSES.add(name, loss)
        return loss

    return register


def find_loss(name: str) -> Loss:
    """The loss of that name.

    Raises:
        UserError: there is none; gives the nearest.
    """
    return LOSSES.find(name)


def build_loss(recipe: Recipe, data: ImageDataset, num_classes: int, device: torch.device) -> Loss:
    """The recipe's loss, with the weights of its classes where it asks for them.

    Args:
        recipe: the settings.
        data: to train on; its labels are counted.
        num_classes: of the logits.
        device: where the loss is computed.

    Raises:
        UserError: there is no such loss, or it takes no weights.
    """
    loss = find_loss(recipe.loss)
    if recipe.class_weights is None:
        return loss
    if not _takes_weights(loss):
        able = " or ".join(name for name, other in LOSSES.items() if _takes_weights(other))
        raise UserError(
            f"loss={recipe.loss} takes no class_weights: use loss={able}, or sampler=balanced, which changes no loss"
        )
    return partial(loss, weight=balanced_weights(data.labels(), num_classes).to(device))


class _WeightedLoss(Protocol):
    def __call__(self, logits: Tensor, labels: Tensor, *, weight: Tensor) -> Tensor: ...


def _takes_weights(loss: Loss) -> TypeGuard[_WeightedLoss]:
    return "weight" in inspect.signature(loss).parameters


def guessing_loss(name: str, num_classes: int) -> float | None:
    """What a loss is where all logits are alike, whatever the labels; None: of a loss of somebody's own, not known."""
    return {"cross_entropy": math.log(num_classes), "bce": math.log(2)}.get(name)


def cross_entropy(logits: Tensor, labels: Tensor, weight: Tensor | None = None) -> Tensor:
    """torch's. With weights, the mean over images of what each contributes: a micro-batch may have any share of them.

    torch divides by the sum of a batch's weights instead, so that a micro-batch of one large class alone would weigh as
    much as any other.
    """
    if weight is None:
        return F.cross_entropy(logits, labels)
    return F.cross_entropy(logits, labels, weight.to(logits.dtype), reduction="sum") / len(labels)


register_loss("cross_entropy")(cross_entropy)
register_loss("bce")(BinaryCrossEntropy(smoothing=0.0))  # one yes or no per class, as in "ResNet strikes back"
