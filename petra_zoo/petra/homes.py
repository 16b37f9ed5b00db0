"""Fixed addresses for what lives from one captured tick to the next: messages, and gradients of a window."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from petra_zoo.petra.links import Links
from petra_zoo.petra.messages import Down, Up
from petra_zoo.petra.stage import Stage

Message = TypeVar("Message", Up, Down)


class Homes:
    """Where messages and gradients lie between captured ticks.

    Attributes:
        inputs: what the first stage is fed.
        ups, downs: messages by receiving stage.
        gradients: of parameters in a window that is not full, by id.
    """

    def __init__(self) -> None:
        self.inputs: Up | None = None
        self.ups: dict[int, Up] = {}
        self.downs: dict[int, Down] = {}
        self.gradients: dict[int, Tensor] = {}

    def feed(self, fed: Up) -> Up:
        """Copies a micro-batch in."""
        self.inputs = _moved(fed, self.inputs)
        return self.inputs

    def settle(self, links: Links, stages: Sequence[Stage]) -> None:
        """Moves in what the links hold and what the stages have accumulated: in between ticks, or at a tick's end."""
        # A block hands one of its streams, and of their gradients, on as it is: a message may lie in the home of the
        # one that its stage received. So messages move in the order in which they travel, the furthest first.
        for j in sorted(links.downs):
            for i, down in enumerate(links.downs[j]):
                links.downs[j][i] = self.downs[j] = _moved(down, self.downs.get(j))
        for j in sorted(links.ups, reverse=True):
            for i, up in enumerate(links.ups[j]):
                links.ups[j][i] = self.ups[j] = _moved(up, self.ups.get(j))
        for stage in stages:
            for p in stage.own_parameters():
                if p.grad is not None:
                    self._move_gradient(p, p.grad)

    def fits(self, fed: Up) -> bool:
        """Whether a micro-batch has the form of those that were fed."""
        return _fits(fed, self.inputs)

    def fit(self, links: Links) -> bool:
        """Whether the messages in flight have the form of those that moved in."""
        downs = all(_fits(down, self.downs.get(j)) for j, queue in links.downs.items() for down in queue)
        return downs and all(_fits(up, self.ups.get(j)) for j, queue in links.ups.items() for up in queue)

    def _move_gradient(self, p: nn.Parameter, gradient: Tensor) -> None:
        home = self.gradients.setdefault(id(p), gradient)
        if gradient is not home:
            home.copy_(gradient)
            p.grad = home


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
    streams = tuple(map(torch.empty_like, message.streams))
    if isinstance(message, Up):
        return replace(message, streams=streams, labels=torch.empty_like(message.labels))
    return replace(
        message, streams=streams, gradients=tuple(None if x is None else torch.empty_like(x) for x in message.gradients)
    )


def _fits(message: Message, home: Message | None) -> bool:
    return home is None or message is home or _form(message) == _form(home)


def _form(message: Up | Down) -> list[object]:
    return [None if x is None else (x.shape, x.stride(), x.dtype, x.device) for x in tensors_of(message)]
