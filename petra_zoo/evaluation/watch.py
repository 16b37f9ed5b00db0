"""What an evaluation leaves besides its scores: every prediction, and the memory it took."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import chain

import torch
from torch import Tensor, nn

from petra_zoo.data.batch_transform import BatchTransform
from petra_zoo.reversible import LiveBytes


class Watched:
    """A model in eval mode whose predictions are kept and whose memory is measured.

    Args:
        model: images [B, C, H, W] -> logits [B, classes].
        device: where it is.
        amp: run it under bfloat16 autocast.
        flips: average the probabilities of each image and its mirror image.
        transform: of the images as they come, bytes.

    Attributes:
        predictions: the best class of each image, per batch.
        confidences: its softmax probability.
        labels: the labels, per batch.
    """

    def __init__(
        self, model: nn.Module, device: torch.device, amp: bool, transform: BatchTransform, flips: bool = False
    ) -> None:
        self.model, self.device, self.amp, self.transform, self.flips = model, device, amp, transform, flips
        self.predictions: list[Tensor] = []
        self.confidences: list[Tensor] = []
        self.labels: list[Tensor] = []
        self._first_batch = 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def labelled(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches as they are; their labels are remembered."""
        for images, labels in batches:
            self.labels.append(labels)
            yield images, labels

    def predict(self, images: Tensor) -> Tensor:
        """Logits [B, classes]; on the CPU the first batch, the largest, is measured."""
        images = self.transform(images)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            if self.predictions or self.device.type == "cuda":
                logits = self._logits(images)
            else:
                with LiveBytes(self._weights()) as memory:
                    logits = self._logits(images)
                self._first_batch = memory.peak + images.nbytes
        self.predictions.append(logits.argmax(1).cpu())
        self.confidences.append(logits.float().softmax(1).amax(1).cpu())
        return logits

    def _logits(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images)
        if not self.flips:
            return logits
        both = torch.stack([logits, self.model(images.flip(-1))]).float().log_softmax(2)
        return both.logsumexp(0) - math.log(2)  # whose softmax is the mean of both

    def peak_memory(self) -> int:
        """Bytes of weights, images and activations at once."""
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device))
        return self._first_batch + sum(x.nbytes for x in self._weights())

    def _weights(self) -> Iterator[Tensor]:
        return chain(self.model.parameters(), self.model.buffers())


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an operation failed because there was no memory for its result; torch says so in several ways."""
    words = ("out of memory", "can't allocate memory", "not enough memory", "could not create a primitive")  # oneDNN
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(word in str(error) for word in words)
