"""Runs of reversible blocks as the converter sees them, whatever network they are in.

A converted network is an ordinary network in which some containers of blocks are coupled. What the converter has to
know of one is a `BlockRun`: how to couple it, how to anchor it, and which units stand behind a call of it. What goes
into a run is what its container is called with while the network computes something: nobody says how to get there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from petra_zoo.converters.reestimation import batch_statistics
from petra_zoo.errors import UserError
from petra_zoo.models.run_buffers import RunBuffers
from petra_zoo.reversible import Streams, Unit, untouched
from petra_zoo.reversible.operands import Operand
from petra_zoo.reversible.remainder import dropped_bits


class Call(NamedTuple):
    """What a container of blocks was called with.

    Attributes:
        training: whether batch norms used the statistics of the batch.
        args: its activation, and what every block takes beside it.
        kwargs: likewise, by name.
    """

    training: bool
    args: tuple[Operand, ...]
    kwargs: dict[str, Operand]


class BlockRun(ABC):
    """Consecutive blocks with one coupling.

    Args:
        name: where the container sits in the network, such as ``layer3`` or ``blocks``.
        container: holds the blocks.
    """

    def __init__(self, name: str, container: RunBuffers) -> None:
        self.name, self.container = name, container

    @property
    @abstractmethod
    def blocks(self) -> int:
        """How many blocks have an inverse where g > 0."""

    @property
    @abstractmethod
    def anchor_every(self) -> int:
        """After how many blocks the streams are kept; 0: never."""

    @anchor_every.setter
    @abstractmethod
    def anchor_every(self, blocks: int) -> None: ...

    @abstractmethod
    def couple(self, g: float) -> None:
        """Couples the source's blocks by g, in place, so that what they add keeps its effect; again, by another g.

        Raises:
            UserError: what they add cannot be given another strength.
        """

    @abstractmethod
    def units(self, call: Call) -> tuple[list[Unit], Streams]:
        """The container's units for such a call, and the streams in front of the first one."""

    def g(self) -> float:
        """The coupling."""
        return self.container.g()

    @property
    def bits(self) -> int:
        """How many low bits of each element of a stream every unit keeps, so that its inverse is exact."""
        g = self.g()
        return (dropped_bits(g) or 0) if g > 0.0 and self.container.streams().on_grid else 0


def calls_of(
    model: nn.Module, runs: Sequence[BlockRun], images: Tensor, behind: Sequence[BlockRun] = ()
) -> list[list[Call]]:
    """What the runs' containers are called with first, while the model sees images [B, C, H, W].

    With running statistics and, where there are at least two images, with those of the batch: up to two calls per run,
    none where the model does not call it. The model stops where all have been called; it runs to its end for no runs.

    Args:
        behind: runs whose outputs are looked at on the way.

    Raises:
        UserError: one of those outputs is not finite.
    """
    found: dict[str, list[Call]] = {run.name: [] for run in runs}
    like = next(model.parameters())
    for training in (False, True)[: min(2, len(images))]:
        with batch_statistics(model, training), untouched(model), torch.no_grad(), _watching(runs, behind) as seen:
            model(images.to(like.device, like.dtype))
        for name, (args, kwargs) in seen.items():
            found[name].append(Call(training, args, kwargs))
    return list(found.values())


def outputs_of(run: BlockRun, calls: Sequence[Call]) -> list[Tensor]:
    """What the run's container gives when it is called so."""
    found = []
    for call in calls:
        container = run.container
        with batch_statistics(container, call.training), untouched(container), torch.no_grad():
            found.append(container(*call.args, **call.kwargs))
    return found


def relative_error(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|, Euclidean norms; infinite where something is not finite."""
    error = float((found - expected).norm() / expected.norm().clamp_min(torch.finfo(expected.dtype).tiny))
    return error if error == error else float("inf")


class _AllSeen(Exception):
    """Nothing further down the model is wanted."""


@contextmanager
def _watching(
    runs: Sequence[BlockRun], behind: Sequence[BlockRun]
) -> Iterator[dict[str, tuple[tuple[Operand, ...], dict[str, Operand]]]]:
    seen: dict[str, tuple[tuple[Operand, ...], dict[str, Operand]]] = {}

    def enter(run: BlockRun, _: nn.Module, args: tuple[Operand, ...], kwargs: dict[str, Operand]) -> None:
        # Copies: what stands behind may write into them.
        kept = tuple(map(_copy, args)), {key: _copy(value) for key, value in kwargs.items()}
        seen.setdefault(run.name, kept)
        if len(seen) == len(runs):
            raise _AllSeen

    def leave(run: BlockRun, _: nn.Module, __: tuple[Operand, ...], output: Operand) -> None:
        if isinstance(output, Tensor) and not torch.isfinite(output).all():
            raise UserError(
                f"the activations behind {run.name} are not finite: check the source's weights and the images' "
                "normalisation"
            )

    with ExitStack() as hooks:
        for run in runs:
            hooks.callback(run.container.register_forward_pre_hook(partial(enter, run), with_kwargs=True).remove)
        for run in behind:
            hooks.callback(run.container.register_forward_hook(partial(leave, run)).remove)
        with suppress(_AllSeen):
            yield seen


def _copy(value: Operand) -> Operand:
    return value.clone() if isinstance(value, Tensor) else value
