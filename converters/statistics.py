"""Batch-norm statistics of a network whose activations have changed, measured anew on unlabelled images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from petra_zoo.errors import UserError


@contextmanager
def batch_statistics(model: nn.Module, training: bool = True) -> Iterator[list[Any]]:
    """Inside, the model's norms with running statistics are in train mode (or not) and everything else in eval mode.

    Yields:
        Those norms. All modes are restored at the end.
    """
    modes = {module: module.training for module in model.modules()}
    norms: list[Any] = [m for m in modes if getattr(m, "track_running_stats", False)]
    model.eval()
    for norm in norms:
        norm.train(training)
    try:
        yield norms
    finally:
        for module, mode in modes.items():
            module.training = mode


def re_estimate(model: nn.Module, batches: Iterable[Tensor]) -> int:
    """Replaces running means and variances by their averages over `batches`, each batch counting the same.

    Dropout and stochastic depth are off; modes and momenta are as before afterwards. Where anything fails, the
    statistics are as before too.

    Args:
        model: a network of images.
        batches: images [B, C, H, W], at least one batch.

    Returns:
        How many images were seen.

    Raises:
        UserError: there is no batch, or one is too small to have a variance.
    """
    before = {name: value.clone() for name, value in model.state_dict().items()}
    like = next(model.parameters())
    images = 0
    with batch_statistics(model) as norms, torch.no_grad():
        momenta = [norm.momentum for norm in norms]
        try:
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # a cumulative average
            for batch in batches:
                model(batch.to(like.device, like.dtype))
                images += len(batch)
            if not images:
                raise UserError("batch-norm statistics need images: there is not one batch to calibrate on")
        except BaseException as error:
            model.load_state_dict(before)
            if isinstance(error, ValueError) and "more than 1 value per channel" in str(error):
                raise UserError("batch-norm statistics need at least 2 images per calibration batch") from error
            raise
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
    return images
