"""What has come out of a pipeline, and how fast images go in."""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor


class Meter:
    """Loss and accuracy of what came out of the pipeline.

    Numbers stay where they are until somebody asks for one: a GPU is not waited for in every tick.
    """

    WINDOW = 50

    def __init__(self) -> None:
        self._read: list[tuple[float, int, int]] = []
        self._unread: list[tuple[Tensor, Tensor, int]] = []

    def add(self, loss: Tensor, correct: Tensor, images: int) -> None:
        """A micro-batch: its mean loss and how many of its images were told right, 0-d each; how many there are."""
        self._unread.append((loss, correct, images))

    def state(self) -> Tensor:
        """Everything so far, float64 [micro-batches, 3]: loss, images told right, images."""
        return torch.tensor(self._rows(), dtype=torch.float64).view(-1, 3)

    def load(self, state: Tensor) -> None:
        """Restores what `state` gave."""
        self._read = [(loss, int(correct), int(images)) for loss, correct, images in state.tolist()]
        self._unread = []

    def recent(self) -> tuple[float | None, float]:
        """Mean loss and accuracy in percent over the last micro-batches; no loss before the first came out."""
        rows = self._rows()[-self.WINDOW :]
        images = sum(row[2] for row in rows)
        if not images:
            return None, 0.0
        return sum(row[0] * row[2] for row in rows) / images, 100.0 * sum(row[1] for row in rows) / images

    def first(self, micro_batches: int) -> float | None:
        """Mean loss of the first micro-batches; None before they have come out."""
        rows = self._rows()[:micro_batches]
        return sum(row[0] for row in rows) / micro_batches if len(rows) == micro_batches else None

    def mean_loss(self) -> float | None:
        """Over everything; None where nothing came out: the pipeline was filling."""
        rows = self._rows()
        images = sum(row[2] for row in rows)
        return sum(row[0] * row[2] for row in rows) / images if images else None

    def _rows(self) -> list[tuple[float, int, int]]:
        """All of them as numbers, fetched at once."""
        if self._unread:
            losses, correct, images = zip(*self._unread, strict=True)
            rows = zip(torch.stack(losses).tolist(), torch.stack(correct).tolist(), images, strict=True)
            self._read += (row for row in rows if math.isfinite(row[0]))  # others are left out, or end the run
            self._unread.clear()
        return self._read


class Speed:
    """Images per second over a sliding window of about five seconds."""

    def __init__(self) -> None:
        self._marks: list[tuple[float, int]] = [(time.perf_counter(), 0)]
        self._images = 0

    def add(self, images: int) -> float:
        """Counts images and gives the present speed."""
        now = time.perf_counter()
        self._images += images
        self._marks.append((now, self._images))
        while len(self._marks) > 2 and now - self._marks[0][0] > 5.0:
            self._marks.pop(0)
        then, before = self._marks[0]
        return (self._images - before) / max(now - then, 1e-9)
