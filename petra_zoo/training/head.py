"""The classifier of a checkpoint that training goes on with: its rows stand in the order of the new data's classes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from petra_zoo.data.labels import all_named, names_of, positions
from petra_zoo.models.classifier import Classifier


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
    for parameter in model.get_classifier().parameters():
        parameter.copy_(parameter[rows])
