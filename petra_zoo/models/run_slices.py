"""Slicing and adding a container of blocks that has more than its blocks: a coupling, anchors, a memory mode."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Self, overload

import torch
from torch import nn


class RunSlices(nn.Sequential):
    """A Sequential whose parts are what it is: slices, sums and products share its coupling with it.

    Attributes:
        opening: names of the blocks that change their input's shape. By name, so that one stays what it is when
            somebody puts another module there, as adapters, wrappers and `convert_sync_batchnorm` do.
    """

    opening = frozenset[str]()  # no annotation: TorchScript would have to know it

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
        """A container of these blocks and the others behind them, with this one's coupling and gain."""
        if not isinstance(other, nn.Sequential):
            raise ValueError(f"only a Sequential can be added to a layer, not {type(other).__name__}")
        self._check_alike(other)
        both = self.with_blocks({str(i): block for i, block in enumerate([*self, *other])})
        both.opening = both._named([*self._opening_blocks(), *_opening_of(other)])
        return both

    @torch.jit.unused
    def __iadd__(self, other: nn.Sequential) -> Self:
        self._check_alike(other)
        with self._renamed(_opening_of(other)):
            return super().__iadd__(other)

    @torch.jit.unused
    def __mul__(self, times: int) -> Self:
        """A container of these blocks so many times over, with this one's coupling."""
        if not isinstance(times, int) or times < 1:
            raise ValueError(f"a layer can be multiplied by 1, 2, ..., not by {times!r}")
        many = self.with_blocks({str(i): block for i, block in enumerate([*self] * times)})
        many.opening = many._named(self._opening_blocks())
        return many

    @torch.jit.unused
    def __imul__(self, other: int) -> Self:
        with self._renamed():
            return super().__imul__(other)

    @torch.jit.unused
    def __delitem__(self, idx: slice | int) -> None:
        with self._renamed():
            super().__delitem__(idx)

    @torch.jit.unused
    def insert(self, index: int, module: nn.Module) -> Self:
        with self._renamed():
            return super().insert(index, module)

    @contextmanager
    def _renamed(self, more: Sequence[nn.Module] = ()) -> Iterator[None]:
        """Around what gives blocks other names: those that open a run still do; `more` of them come with it."""
        opening = [*self._opening_blocks(), *more]
        yield
        self.opening = self._named(opening)

    def _opening_blocks(self) -> list[nn.Module]:
        return [block for name, block in self._modules.items() if name in self.opening and block is not None]

    def _named(self, blocks: Sequence[nn.Module]) -> frozenset[str]:
        return frozenset(name for name, block in self._modules.items() if any(block is other for other in blocks))

    def _check_alike(self, other: nn.Sequential) -> None:
        if isinstance(other, RunSlices) and (other.g(), other.gain_now()) != (self.g(), self.gain_now()):
            raise ValueError(
                f"layers with couplings {self.g():g} and {other.g():g}, gains {self.gain_now():g} and "
                f"{other.gain_now():g} cannot become one"
            )

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

    @torch.jit.unused
    def gain_now(self) -> float:
        """The gain of the blocks' branches, 1 at g = 0."""
        raise NotImplementedError


def _opening_of(container: nn.Sequential) -> list[nn.Module]:
    return container._opening_blocks() if isinstance(container, RunSlices) else []
