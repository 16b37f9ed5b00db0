"""Batch-norm statistics of a network whose activations have changed, measured anew on unlabelled images."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Protocol, Self, TypeGuard

import torch
from torch import Tensor, nn

from petra_zoo.converters.calibration import Batches, image_batches
from petra_zoo.errors import UserError


class TrackingNorm(Protocol):
    """A norm with running statistics, whoever made it."""

    running_mean: Tensor
    running_var: Tensor
    momentum: float | None
    eps: float

    def train(self, mode: bool = True) -> Self: ...

    def reset_running_stats(self) -> None: ...


@contextmanager
def batch_statistics(model: nn.Module, training: bool = True) -> Iterator[list[TrackingNorm]]:
    """Inside, the model's norms with running statistics are in train mode (or not) and everything else in eval mode.

    Yields:
        Those norms. All modes are restored at the end.
    """
    modes = {module: module.training for module in model.modules()}
    norms = [module for module in modes if _is_tracking(module)]
    model.eval()
    for norm in norms:
        norm.train(training)
    try:
        yield norms
    finally:
        for module, mode in modes.items():
            module.training = mode


def re_estimate(model: nn.Module, batches: Batches, source: nn.Module | None = None) -> int:
    """Replaces running means and variances by their averages over `batches`, each batch counting the same.

    With the `source` that a model was converted from, the model keeps the source's running statistics and only takes
    over what the conversion changed about them: the mean moves by the difference, and the variance by the ratio, of
    the two networks' averages over `batches`. Images that are unlike those that the source was trained on (without
    augmentation, for example) then do no harm. Dropout and stochastic depth are off; modes and momenta are as before
    afterwards. Where anything fails, the statistics are as before too.

    Args:
        model: a network of images.
        batches: images [B, C, H, W], or batches of them, such as a loader (labels are not looked at); at least one.
        source: a network with norms of the same names, in the same order, and the statistics that the model has now;
            left as it is.

    Returns:
        How many images were seen.

    Raises:
        UserError: there is no batch, or one is too small to have a variance.
    """
    networks = [model] if source is None else [model, copy.deepcopy(source)]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    like = next(model.parameters())
    images = 0
    with ExitStack() as stack, torch.no_grad():
        of_model, *of_source = [stack.enter_context(batch_statistics(network)) for network in networks]
        momenta = [norm.momentum for norm in of_model]
        kept = [(norm.running_mean.clone(), norm.running_var.clone()) for norm in of_model]
        try:
            for norm in (norm for norms in (of_model, *of_source) for norm in norms):
                norm.reset_running_stats()
                norm.momentum = None  # a cumulative average
            for batch in image_batches(batches):
                for network in networks:
                    network(batch.to(like.device, like.dtype))
                images += len(batch)
            if not images:
                raise UserError("batch-norm statistics need images: there is not one batch to calibrate on")
            for norms in of_source:
                for norm, reference, (mean, var) in zip(of_model, norms, kept, strict=True):
                    norm.running_mean.sub_(reference.running_mean).add_(mean)
                    norm.running_var.add_(norm.eps).div_(reference.running_var + norm.eps).mul_(var)
        except BaseException as error:
            model.load_state_dict(before)
            if isinstance(error, ValueError) and "more than 1 value per channel" in str(error):
                raise UserError("batch-norm statistics need at least 2 images per calibration batch") from error
            raise
        finally:
            for norm, momentum in zip(of_model, momenta, strict=True):
                norm.momentum = momentum
    return images


def has_statistics(model: nn.Module) -> bool:
    """Whether there is anything to estimate: a norm with running statistics."""
    return any(_is_tracking(module) for module in model.modules())


def _is_tracking(module: nn.Module) -> TypeGuard[TrackingNorm]:
    return getattr(module, "track_running_stats", False)
