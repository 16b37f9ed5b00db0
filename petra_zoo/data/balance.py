"""Classes of unequal size: weights that make up for it in the loss, or an order of images in which all are as frequent.

Either makes every class count the same; both together would favour the small ones.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Labels = npt.NDArray[np.int64]  # [N]; below 0: of an image that cannot be read


def class_counts(labels: Labels, num_classes: int) -> Labels:
    """How many images each class has [classes]."""
    return np.bincount(labels[labels >= 0], minlength=num_classes)


def balanced_weights(labels: Labels, num_classes: int) -> Tensor:
    """A weight per class, float32 [classes]: inverse to its images, 1 on average over all images, as in scikit-learn.

    A class without images gets 1.
    """
    counts = class_counts(labels, num_classes)
    each = counts.sum() / max(1, np.count_nonzero(counts))
    return torch.from_numpy(np.where(counts > 0, each / np.maximum(counts, 1), 1.0)).float()


def balanced_order(labels: Labels, generator: np.random.Generator) -> Labels:
    """An epoch of as many images as there are [N], in which classes differ by one image at most.

    A class with more images than its share leaves out some, other ones every time; one with fewer repeats its own, and
    none of them twice before all have been there.
    """
    members = [np.flatnonzero(labels == label) for label in np.unique(labels[labels >= 0])]
    shares = np.full(len(members), len(labels) // len(members))
    shares[generator.permutation(len(members))[: len(labels) % len(members)]] += 1
    chosen = [
        np.concatenate([generator.permutation(own) for _ in range(-(-share // len(own)))])[:share]
        for own, share in zip(members, shares, strict=True)
        if share
    ]
    return generator.permutation(np.concatenate(chosen))


def occurrences(order: Labels) -> Labels:
    """How often each entry has been there before [N]."""
    by_value = np.argsort(order, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(order[by_value]) != 0])
    lengths = np.diff(np.r_[starts, len(order)])
    found = np.empty_like(order)
    found[by_value] = np.arange(len(order)) - np.repeat(starts, lengths)
    return found
