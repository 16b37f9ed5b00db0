"""Slicing and adding a container of blocks that has more than its blocks: a coupling, anchors, a memory mode."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Self, overload

import torch
from torch import nn


class RunSlices(nn.Sequential):
    """A Sequential whose parts are what it is: slices, sums and products share its coupling with it."""

    if TYPE_CHECKING:

        @overload
        def __getitem__(self, idx: slice) -> Self: ...

        @overload
        def __getitem__(self, idx: int) -> nn.Module: ...

    def __getitem__(self, idx: int | slice) -> nn.Module:
        """A block, or a slice as a container that shares blocks and coupling with this one."""
        if not isinstance(idx, slice):
            return super().__getitem__(idx)
        return self.with_blocks(dict(list(self._modules.items())[idx]))

    @torch.jit.unused
    def __add__(self, other: nn.Sequential) -> Self:
        """A container of these blocks and the others behind them, with this one's coupling."""
        if not isinstance(other, nn.Sequential):
            raise ValueError(f"only a Sequential can be added to a layer, not {type(other).__name__}")
        if isinstance(other, RunSlices) and other.g() != self.g():
            raise ValueError(f"layers with couplings {self.g():g} and {other.g():g} cannot become one")
        return self.with_blocks({str(i): block for i, block in enumerate([*self, *other])})

    @torch.jit.unused
    def __mul__(self, times: int) -> Self:
        """A container of these blocks so many times over, with this one's coupling."""
        if not isinstance(times, int) or times < 1:
            raise ValueError(f"a layer can be multiplied by 1, 2, ..., not by {times!r}")
        return self.with_blocks({str(i): block for i, block in enumerate([*self] * times)})

    @torch.jit.unused
    def with_blocks(self, blocks: Mapping[str, nn.Module]) -> Self:
        """A container of other blocks that shares this one's coupling."""
        other = copy.copy(self)  # shares the dict of buffers: its coupling stays this one's
        other._modules = dict(blocks)
        return other

    @torch.jit.unused
    def g(self) -> float:
        """The coupling as a number."""
        raise NotImplementedError
