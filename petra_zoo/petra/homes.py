"""Fixed addresses for messages, which live from one captured tick to the next."""

from __future__ import annotations

from copy import copy

import torch
from torch import Tensor

from petra_zoo.petra.links import Links, Message
from petra_zoo.petra.messages import Down, Up


class Homes:
    """Where messages lie between captured ticks.

    Attributes:
        inputs: what the first stage is fed.
        ups, downs: messages by receiving stage.
    """

    def __init__(self) -> None:
        self.inputs: Up | None = None
        self.ups: dict[int, Up] = {}
        self.downs: dict[int, Down] = {}

    def feed(self, fed: Up) -> Up:
        """Copies a micro-batch in."""
        self.inputs = _moved(fed, self.inputs)
        return self.inputs

    def settle(self, links: Links) -> None:
        """Moves in what the links hold: in between ticks, or at a tick's end."""
        # A block hands one of its streams, and of their gradients, on as it is: a message may lie in the home of the
        # one that its stage received. So messages move in the order in which they travel, the furthest first.
        for j in sorted(links.downs):
            for i, down in enumerate(links.downs[j]):
                links.downs[j][i] = self.downs[j] = _moved(down, self.downs.get(j))
        for j in sorted(links.ups, reverse=True):
            for i, up in enumerate(links.ups[j]):
                links.ups[j][i] = self.ups[j] = _moved(up, self.ups.get(j))

    @property
    def widest(self) -> int:
        """How many numbers the largest tensor on its way up has."""
        return max((x.numel() for up in self.ups.values() for x in up.streams), default=0)

    def fits(self, fed: Up) -> bool:
        """Whether a micro-batch has the form of those that were fed."""
        return _fits(fed, self.inputs)

    def fit(self, links: Links, images: int) -> bool:
        """Whether the messages in flight have the form of those that moved in, and so many images."""
        if any(len(up.streams[0]) != images for queue in links.ups.values() for up in queue):
            return False
        downs = all(_fits(down, self.downs.get(j)) for j, queue in links.downs.items() for down in queue)
        return downs and all(_fits(up, self.ups.get(j)) for j, queue in links.ups.items() for up in queue)


def tensors_of(message: Up | Down) -> tuple[Tensor | None, ...]:
    """All tensors of a message."""
    return (*message.streams, message.labels) if isinstance(message, Up) else (*message.streams, *message.gradients)


def _moved(message: Message, home: Message | None) -> Message:
    """The message in its home, which is made for the first one."""
    if message is home:
        return message
    if home is None:
        home = _empty(message)
    home.micro_batch = message.micro_batch
    for there, x in zip(tensors_of(home), tensors_of(message), strict=True):
        if there is not None and x is not None:
            there.copy_(x, non_blocking=True)
    return home


def _empty(message: Message) -> Message:
    empty = copy(message)
    empty.streams = tuple(map(torch.empty_like, message.streams))
    if isinstance(empty, Up):
        empty.labels = torch.empty_like(empty.labels)
    else:
        empty.gradients = tuple(None if x is None else torch.empty_like(x) for x in empty.gradients)
    return empty


def _fits(message: Message, home: Message | None) -> bool:
    return home is None or message is home or _form(message) == _form(home)


def _form(message: Up | Down) -> list[object]:
    return [None if x is None else (x.shape, _strides_at_home(x), x.dtype, x.device) for x in tensors_of(message)]


def _strides_at_home(x: Tensor) -> tuple[int, ...]:
    """Those that a copy has: a tensor with gaps, half of another, has others."""
    dense = x.is_contiguous() or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last))
    return x.stride() if dense else torch.empty_like(x, device="meta").stride()
