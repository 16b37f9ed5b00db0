"""The type of streams: what carries them, which grid they lie on, how they come in and how they go out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from petra_zoo.errors import UserError
from petra_zoo.reversible.reading import readable

# These look at a tensor's type or values: torch.fx must not trace into them, TorchScript calls the first two as they
# are (it knows no `StreamType`), and nobody else but `StreamType` does.


def to_carrier(x: Tensor) -> Tensor:
    """x in at least float32, so that the inverse stays accurate: below g = 1 it multiplies rounding errors by 1/g."""
    if x.dtype == torch.float64:
        return x
    return x.float()


def to_grid(x: Tensor, grid: float) -> Tensor:
    """x rounded to multiples of `grid`, with a straight-through gradient."""
    if torch.jit.is_scripting():
        return torch.round(x / grid) * grid
    check_range(x, grid)
    return _Round.apply(x, grid)


def check_range(x: Tensor, grid: float) -> None:
    """See `StreamType.check`."""
    if not readable(x):
        return
    limit = grid * 2.0 ** (24 if x.dtype == torch.float32 else 53)
    largest = x.detach().abs().max() if x.numel() else x.new_zeros(())
    if not bool(largest < limit):
        raise UserError(
            f"exact inversion needs |stream| < {limit:g} (grid {grid:g} in {x.dtype}), found {largest.item():g}: "
            "use a coarser grid (a smaller exact_bits) or exact=False"
        )


torch.fx.wrap("to_carrier")
torch.fx.wrap("to_grid")
torch.fx.wrap("check_range")


class _Round(torch.autograd.Function):
    """Rounds to a grid; the gradient passes straight through."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, grid: float) -> Tensor:
        return torch.round(x / grid) * grid

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


@dataclass(frozen=True)
class StreamType:
    """The type of the streams of a run. The one place that knows it; units, blocks, layers and networks ask here.

    Streams are carried in float32, or in float64 where activations are. Branches compute in the type of their weights.

    Attributes:
        grid: > 0 (a power of two) rounds what enters a run and every step in it to multiples of it. Sums of two
            multiples are exact as long as they stay below 2**24 grids in float32 (2**53 in float64), so at g = 1 the
            inverse subtracts to the bit what the forward has added.
    """

    grid: float = 0.0

    def carry(self, x: Tensor) -> Tensor:
        """An activation in the carrier, its value as it is."""
        return to_carrier(x)

    def enter(self, x: Tensor) -> Tensor:
        """The stream that an activation becomes where a run starts.

        Raises:
            UserError: see `check`.
        """
        return self.snap(to_carrier(x))

    def snap(self, x: Tensor) -> Tensor:
        """A stream, or a step that is added to one, rounded to the grid; the gradient passes straight through.

        Raises:
            UserError: see `check`.
        """
        return to_grid(x, self.grid) if self.grid > 0.0 else x

    def check(self, b: Tensor) -> None:
        """Checks that a sum of streams is small enough to lie on the grid in its own type.

        Reads the largest absolute value back (a device synchronisation): exact inversion trades speed for bits.
        Compiled, exported and vectorised networks are not inverted, and not checked.

        Raises:
            UserError: a value is too large.
        """
        if self.grid > 0.0:
            check_range(b, self.grid)

    def for_branch(self, h: Tensor, module: nn.Module) -> Tensor:
        """The activation of a stream in the type of a module's weights, whatever wraps them; as it is without any."""
        weight: Tensor | None = next((p for p in module.parameters() if p.is_floating_point()), None)
        if weight is None:  # none, or all of them plain attributes, as in DataParallel's replicas
            attributes = (value for m in module.modules() for value in vars(m).values())
            weight = next((x for x in attributes if isinstance(x, Tensor) and x.is_floating_point()), None)
        return h if weight is None else h.to(weight.dtype)

    def leave(self, h: Tensor, module: nn.Module) -> Tensor:
        """The activation behind a run, in the type of the weights of the module that the run is part of."""
        return self.for_branch(h, module)


FLOAT_STREAMS = StreamType()
