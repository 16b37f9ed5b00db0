"""How messages lie in memory while they travel between processes: what both ends of a link must know alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self, TypedDict

import torch
from torch import Tensor

from petra_zoo.petra.links import Wire
from petra_zoo.petra.messages import Down, Up

_ALIGNMENT = 64  # bytes


@dataclass(frozen=True)
class Form:
    """How one tensor of a message lies in memory.

    Attributes:
        shape: of a full micro-batch.
        order: its dimensions from the outermost in memory to the innermost; the first is the batch.
        wire: type on the way; `dtype`: type before and after.
    """

    shape: tuple[int, ...]
    order: tuple[int, ...]
    wire: torch.dtype
    dtype: torch.dtype

    @classmethod
    def of(cls, x: Tensor, dtype: torch.dtype, images: int = 0) -> Self:
        """Of a tensor as it travels.

        Args:
            x: packed.
            dtype: before and after.
            images: of a full micro-batch, where this one may be smaller.
        """
        order = tuple(sorted(range(x.ndim), key=lambda i: -x.stride()[i]))
        dense = x.permute(order).is_contiguous() and order[0] == 0
        return cls((max(images, len(x)), *x.shape[1:]), order if dense else tuple(range(x.ndim)), x.dtype, dtype)

    @property
    def nbytes(self) -> int:
        """Of a full micro-batch on its way."""
        return math.prod(self.shape) * self.wire.itemsize

    def view(self, memory: Tensor, size: int) -> Tensor:
        """The first `size` images in a piece of memory, in the tensor's own order of dimensions."""
        dense = memory.view(self.wire).view([self.shape[i] for i in self.order])
        return dense[:size].permute([self.order.index(i) for i in range(len(self.order))])

    def as_json(self) -> _FormJson:
        """For the other end."""
        return {"shape": self.shape, "order": self.order, "wire": str(self.wire), "dtype": str(self.dtype)}

    @classmethod
    def from_json(cls, values: _FormJson) -> Self:
        """What the other end has said."""
        wire, dtype = (getattr(torch, values[key].removeprefix("torch.")) for key in ("wire", "dtype"))
        return cls(tuple(values["shape"]), tuple(values["order"]), wire, dtype)


class _FormJson(TypedDict):
    shape: Sequence[int]
    order: Sequence[int]
    wire: str
    dtype: str


@dataclass(frozen=True)
class Body:
    """How the tensors of a message lie in one piece of memory, which travels as one.

    Attributes:
        forms: of the tensors; None where the message has none.
        streams: how many of them are streams.
    """

    forms: Sequence[Form | None]
    streams: int

    @property
    def nbytes(self) -> int:
        """Of a full micro-batch."""
        return sum(_aligned(form.nbytes) for form in self.forms if form)

    @property
    def images(self) -> int:
        """Of a full micro-batch."""
        return next(form.shape[0] for form in self.forms if form)

    def views(self, memory: Tensor, size: int) -> list[Tensor | None]:
        """Its tensors, of `size` images, in a piece of memory [nbytes]."""
        found, start = list[Tensor | None](), 0
        for form in self.forms:
            if form is None:
                found.append(None)
                continue
            found.append(form.view(memory[start : start + form.nbytes], size))
            start += _aligned(form.nbytes)
        return found

    def as_json(self) -> _BodyJson:
        """For the other end."""
        return {"forms": [None if form is None else form.as_json() for form in self.forms], "streams": self.streams}

    @classmethod
    def from_json(cls, values: _BodyJson) -> Self:
        """What the other end has said."""
        return cls([None if row is None else Form.from_json(row) for row in values["forms"]], values["streams"])


class _BodyJson(TypedDict):
    forms: Sequence[_FormJson | None]
    streams: int


def _aligned(nbytes: int) -> int:
    """As many bytes or more, so that any type may begin behind them."""
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


@dataclass(frozen=True)
class Parcel:
    """What a message carries.

    Attributes:
        tensors: as they travel, streams first.
        types: before and after.
        streams: how many of them are streams.
    """

    tensors: Sequence[Tensor | None]
    types: Sequence[torch.dtype | None]
    streams: int

    @classmethod
    def of(cls, message: Up | Down, wire: Wire) -> Self:
        """Of a message that is about to travel."""
        if isinstance(message, Up):
            tensors = [*(wire.pack(x, "up") for x in message.streams), message.labels]
            return cls(tensors, [*(x.dtype for x in message.streams), message.labels.dtype], len(message.streams))
        whole = [*message.streams, *message.gradients]
        packed = [None if x is None else wire.pack(x, "down") for x in whole]
        return cls(packed, [None if x is None else x.dtype for x in whole], len(message.streams))

    @property
    def images(self) -> int:
        """How many it is of."""
        return next(len(x) for x in self.tensors if x is not None)

    def body(self, images: int) -> Body:
        """How it travels, with so many images at least."""
        forms = [
            None if x is None or dtype is None else Form.of(x, dtype, images)
            for x, dtype in zip(self.tensors, self.types, strict=True)
        ]
        return Body(forms, self.streams)
