"""Losses by name: what a recipe's `loss` may say.

Labels are class indices [B], or probabilities [B, classes] where images are mixed, labels smoothed (by the loader, so
a loss has nothing to smooth) or a teacher is distilled from.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from timm.loss import BinaryCrossEntropy

from petra_zoo.petra.part import Loss
from petra_zoo.registry import Registry

LOSSES: Registry[Loss] = Registry("loss", "petra_zoo.losses")


def register_loss(name: str) -> Callable[[Loss], Loss]:
    """Makes a loss known by name, to recipes.

    What is decorated takes logits [B, classes] and labels ([B] or [B, classes], see above) and gives their mean loss,
    a 0-d tensor. It runs where the head is (with `method=local` in every stage), has no parameters, and draws nothing.

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


register_loss("cross_entropy")(F.cross_entropy)
register_loss("bce")(BinaryCrossEntropy(smoothing=0.0))  # one yes or no per class, as in "ResNet strikes back"
