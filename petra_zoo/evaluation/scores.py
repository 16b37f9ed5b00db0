"""Accuracy of a model on a data set."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from petra_zoo.strict_json import JsonObject


@dataclass(frozen=True)
class Scores:
    """What a model scores.

    Attributes:
        top1: share of images whose label is the best guess, in percent.
        top5: share whose label is among the best five, in percent.
        loss: mean cross-entropy.
        images: how many images counted.
        confusion: [classes, classes] counts; row: label, column: prediction.
    """

    top1: float
    top5: float
    loss: float
    images: int
    confusion: Tensor

    def worst_classes(self, names: list[str], count: int = 3) -> list[JsonObject]:
        """The classes most often mistaken: accuracy in percent, and what they are taken for most."""
        totals = self.confusion.sum(1)
        accuracy = self.confusion.diagonal() / totals.clamp_min(1)
        worst = [int(i) for i in torch.argsort(accuracy, stable=True) if totals[i] > 0 and accuracy[i] < 1][:count]
        rows: list[JsonObject] = []
        for i in worst:
            others = self.confusion[i].clone()
            others[i] = 0
            j = int(others.argmax())
            rows.append(
                {
                    "class": names[i],
                    "accuracy": 100.0 * float(accuracy[i]),
                    "images": int(totals[i]),
                    "taken_for": names[j],
                    "times": int(others[j]),
                }
            )
        return rows


@torch.no_grad()
def evaluate(
    predict: Callable[[Tensor], Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    num_classes: int,
    device: torch.device,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Scores:
    """Runs a model over batches.

    Args:
        predict: images [B, C, H, W] -> logits [B, num_classes], in eval mode.
        batches: images and labels [B]; a label below 0 leaves its image out.
        num_classes: number of logits.
        device: where the model is.
        memory_format: layout of the images.
    """
    pairs = (
        (predict(images.to(device, memory_format=memory_format, non_blocking=True)), labels)
        for images, labels in batches
    )
    return score(pairs, num_classes)


def score(pairs: Iterable[tuple[Tensor, Tensor]], num_classes: int) -> Scores:
    """Compares logits [B, num_classes] with labels [B], batch by batch; images without a label (< 0) are left out."""
    correct1 = correct5 = images_seen = 0
    loss = 0.0
    confusion = torch.zeros(num_classes, num_classes, dtype=torch.long)
    for logits, labels in pairs:
        labels = labels.cpu()
        logits, labels = logits.float().cpu()[labels >= 0], labels[labels >= 0]
        best = logits.topk(min(5, num_classes), dim=1).indices
        hits = best == labels[:, None]
        correct1 += int(hits[:, 0].sum())
        correct5 += int(hits.sum())
        loss += float(F.cross_entropy(logits, labels, reduction="sum"))
        images_seen += len(labels)
        confusion.index_put_((labels, best[:, 0]), torch.ones_like(labels), accumulate=True)
    seen = max(1, images_seen)
    return Scores(100.0 * correct1 / seen, 100.0 * correct5 / seen, loss / seen, images_seen, confusion)
