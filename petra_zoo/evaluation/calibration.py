"""Whether a model is right as often as it says it is."""

from __future__ import annotations

import math

import torch
from torch import Tensor

BINS = 15


def calibration_error(confidences: Tensor, correct: Tensor, bins: int = BINS) -> float:
    """The expected calibration error in percent: of images with a similar confidence, how far it is from the accuracy.

    Images are sorted by confidence into bins of equal width; each bin's difference counts by its images (Guo et al.,
    arXiv 1706.04599, equation 3). nan without images.

    Args:
        confidences: softmax probability of the best class [N], 0 to 1.
        correct: whether that class was right, bool [N].
        bins: how many; the literature's 15.
    """
    of_bin = (confidences.double() * bins).ceil().long().clamp(1, bins) - 1  # (0, 1/bins], and so on
    over = torch.zeros(bins, dtype=torch.float64).index_add_(0, of_bin, confidences.double() - correct.double())
    return 100.0 * float(over.abs().sum()) / len(confidences) if len(confidences) else math.nan
