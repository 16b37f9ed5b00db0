"""Batches on their way to the device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache

import torch
from torch import Tensor

# Images and what else their transformation takes (see `petra_zoo.data.batch_transform`), and labels.
Batch = tuple[tuple[Tensor, ...], Tensor]


def on_device(
    batches: Iterable[Batch], device: torch.device, memory_format: torch.memory_format = torch.contiguous_format
) -> Iterator[Batch]:
    """The same batches on a device; a GPU's are copied one ahead, while it computes.

    timm's `PrefetchLoader` normalises what it has copied; here images stay bytes until the network wants them.

    Args:
        batches: best from page-locked memory where they go to a GPU; else they are copied there first.
        device: where to.
        memory_format: of the images.
    """
    if device.type != "cuda":
        return (_to(batch, device, memory_format) for batch in batches)
    return _one_ahead(batches, device, memory_format)


def _one_ahead(batches: Iterable[Batch], device: torch.device, memory_format: torch.memory_format) -> Iterator[Batch]:
    copying = _copy_stream(device)
    ready: Batch | None = None
    for batch in batches:
        # The copy may go into memory that the consumer has given back: its work on it, queued by now, has to end first.
        # So no memory needs to be marked as used by two streams.
        copying.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(copying):
            coming = _to(batch, device, memory_format)
        if ready is not None:
            yield ready
        torch.cuda.current_stream(device).wait_stream(copying)
        ready = coming
    if ready is not None:
        yield ready


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all epochs: memory that was allocated on a stream serves that stream alone again."""
    return torch.cuda.Stream(device)


def _to(batch: Batch, device: torch.device, memory_format: torch.memory_format) -> Batch:
    (images, *others), labels = batch

    def to(x: Tensor, memory_format: torch.memory_format = torch.preserve_format) -> Tensor:
        # Mixed labels are made in this process, in ordinary memory, from which a large copy would make the host wait.
        if device.type == "cuda" and x.is_cpu and not x.is_pinned():
            x = x.pin_memory()
        return x.to(device, memory_format=memory_format, non_blocking=True)

    return (to(images, memory_format), *map(to, others)), to(labels)
