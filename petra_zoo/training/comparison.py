"""Two models on the same images: do they agree, and is one better than chance would make it look?"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from petra_zoo.errors import UserError
from petra_zoo.training.checkpoint_evaluation import Report


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

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def compare(first: Report, second: Report) -> Comparison:
    """Compares two evaluations on the same images.

    Raises:
        UserError: they are of different data sets, or not of the same images in the same order.
    """
    if first.dataset != second.dataset or not first.labels.equal(second.labels):
        raise UserError(f"{first.model} and {second.model} were not evaluated on the same images: name one --dataset")
    first_right, second_right = (report.predictions == report.labels for report in (first, second))
    only_first, only_second = int((first_right & ~second_right).sum()), int((second_right & ~first_right).sum())
    return Comparison(
        first=first.model,
        second=second.model,
        images=len(first.labels),
        agreement=100.0 * float((first.predictions == second.predictions).double().mean()),
        only_first_right=only_first,
        only_second_right=only_second,
        p_value=mcnemar(only_first, only_second),
    )


def mcnemar(only_first: int, only_second: int) -> float:
    """McNemar's exact test, two-sided: images that one model alone gets right fall to either by a fair coin."""
    n = only_first + only_second
    tail = sum(math.comb(n, i) for i in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / 2**n)  # integers, divided exactly
