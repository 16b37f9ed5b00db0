"""Two models on the same images: do they agree, and is one better than chance would make it look?"""

from __future__ import annotations

import itertools
import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from petra_zoo.data.labels import positions
from petra_zoo.errors import UserError
from petra_zoo.evaluation.checkpoint_evaluation import EvaluationReport
from petra_zoo.strict_json import JsonObject


@dataclass(frozen=True)
class Comparison:
    """Image by image.

    Attributes:
        agreement: percent of images for which both predict the same class, right or wrong.
        only_first_right: images that the first model alone gets right.
        only_second_right: images that the second alone gets right.
        p_value: McNemar's exact test: how likely a split of those images at least so uneven is, were both models
            equally good.
    """

    first: str
    second: str
    images: int
    agreement: float
    only_first_right: int
    only_second_right: int
    p_value: float

    def as_dict(self) -> JsonObject:
        """For JSON."""
        return asdict(self)


def compare(first: EvaluationReport, second: EvaluationReport) -> Comparison:
    """Compares two evaluations on the same images.

    Images are the same where their pixels are, wherever they lie; classes, where their names are. Both reports need
    fingerprints: `EvaluationOptions(fingerprints=True)`.

    Raises:
        UserError: they are not of the same images with the same labels, in the same order.
        ValueError: a report has no fingerprints.
    """
    if not (first.fingerprints and second.fingerprints):
        raise ValueError("to be compared, both models have to be evaluated with fingerprints=True")
    to_first = _classes_of_first(first, second)
    predictions, labels = to_first[second.predictions], to_first[second.labels]
    models = f"{first.model} and {second.model}"
    if first.fingerprints != second.fingerprints:
        differ = sum(one != other for one, other in zip(first.fingerprints, second.fingerprints, strict=False))
        counts = f"{len(first.fingerprints)} and {len(second.fingerprints)} images, of which {differ} differ"
        raise UserError(f"{models} were not evaluated on the same images ({counts}): name one --dataset and --data-dir")
    if not first.labels.equal(labels):
        raise UserError(f"{models} were evaluated on the same images, but with other labels: name one --dataset")
    first_right, second_right = first.predictions == first.labels, predictions == labels
    only_first, only_second = int((first_right & ~second_right).sum()), int((second_right & ~first_right).sum())
    return Comparison(
        first=first.model,
        second=second.model,
        images=len(first.labels),
        agreement=100.0 * float((first.predictions == predictions).double().mean()),
        only_first_right=only_first,
        only_second_right=only_second,
        p_value=mcnemar(only_first, only_second),
    )


def _classes_of_first(first: EvaluationReport, second: EvaluationReport) -> Tensor:
    """The first model's class for each of the second's [classes]; beyond the first's, for those that it lacks."""
    beyond = itertools.count(len(first.class_names))
    places = positions(second.class_names, first.class_names)
    return torch.tensor([next(beyond) if place is None else place for place in places])


def mcnemar(only_first: int, only_second: int) -> float:
    """McNemar's exact test, two-sided: images that one model alone gets right fall to either by a fair coin."""
    n = only_first + only_second
    tail = sum(math.comb(n, i) for i in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / 2**n)  # integers, divided exactly
