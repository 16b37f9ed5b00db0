"""How much a converted network differs from its source, and how well its runs can be inverted."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from petra_zoo.converters.calibration import image_batches
from petra_zoo.converters.reconstruction import MEASURED_IMAGES, CoupledRun, measure_runs
from petra_zoo.converters.reestimation import batch_statistics
from petra_zoo.errors import UserError
from petra_zoo.strict_json import JsonObject


@dataclass(frozen=True)
class Fidelity:
    """A converted network compared with its source, both in eval mode.

    Attributes:
        images: how many were compared.
        agreement: percent of images for which both predict the same class.
        logit_error: mean over images of |converted - source| / |source|, Euclidean norms of the logits.
        kl: mean Kullback-Leibler divergence of the converted from the source's prediction, in nats.
        source_top1: percent of labelled images that the source gets right; None without labels.
        converted_top1: the same of the converted network.
        runs: coupling, anchors and reconstruction error of each run.
    """

    images: int
    agreement: float
    logit_error: float
    kl: float
    source_top1: float | None
    converted_top1: float | None
    runs: list[CoupledRun]

    def as_dict(self) -> JsonObject:
        """For JSON."""
        return asdict(self)


def measure_fidelity(
    source: nn.Module, converted: nn.Module, batches: Tensor | Iterable[Tensor | tuple[Tensor, Tensor]]
) -> Fidelity:
    """Compares a converted network with its source.

    Args:
        source: gives logits [B, classes].
        converted: the same from the same images.
        batches: images [B, C, H, W], batches of them, or pairs of such a batch and its labels [B] (all of them, or
            none).

    Raises:
        UserError: there is no image, or some batches have labels and others none.
    """
    like = next(converted.parameters())
    sums = dict.fromkeys(("images", "labelled", "agree", "error", "kl", "source", "converted"), 0.0)
    runs: list[CoupledRun] = []
    with torch.no_grad(), batch_statistics(source, False), batch_statistics(converted, False):
        for batch in image_batches(batches) if isinstance(batches, Tensor) else batches:
            images, labels = (batch, None) if isinstance(batch, Tensor) else batch
            images = images.to(like.device, like.dtype)
            runs = runs or measure_runs(converted, images[:MEASURED_IMAGES])
            expected, found = source(images).double(), converted(images).double()
            sums["images"] += len(images)
            sums["agree"] += float((expected.argmax(1) == found.argmax(1)).sum())
            sums["error"] += float(((found - expected).norm(dim=1) / expected.norm(dim=1)).sum())
            sums["kl"] += float(
                F.kl_div(found.log_softmax(1), expected.log_softmax(1), reduction="sum", log_target=True)
            )
            if labels is not None:
                labels = labels.to(like.device)
                sums["labelled"] += len(images)
                sums["source"] += float((expected.argmax(1) == labels).sum())
                sums["converted"] += float((found.argmax(1) == labels).sum())
    n = sums["images"]
    if not n or sums["labelled"] not in (0.0, n):
        raise UserError("fidelity is measured on at least one image, and either all images have labels or none")
    labelled = sums["labelled"] > 0
    return Fidelity(
        images=int(n),
        agreement=100 * sums["agree"] / n,
        logit_error=sums["error"] / n,
        kl=sums["kl"] / n,
        source_top1=100 * sums["source"] / n if labelled else None,
        converted_top1=100 * sums["converted"] / n if labelled else None,
        runs=runs,
    )
