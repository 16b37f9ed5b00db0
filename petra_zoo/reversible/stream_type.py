"""The type of streams: what carries them, which grid they lie on, how they come in and how they go out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from petra_zoo.errors import UserError
from petra_zoo.reversible.reading import readable

StreamKind = Literal["auto", "float32", "bfloat16"]

# These look at a tensor's type or values: torch.fx must not trace into them, TorchScript calls the first two as they
# are (it knows no `StreamType`), and nobody else but `StreamType` does.


def to_carrier(x: Tensor, kind: str = "float32") -> Tensor:
    """x in what carries streams of a kind; float32: in at least that, so that float64 keeps what it has."""
    if kind == "bfloat16":
        return x.to(torch.bfloat16)
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


def to_branch(h: Tensor, dtype: torch.dtype) -> Tensor:
    """An activation for weights of a type; one that autocast would give stays, operations take it as it is."""
    if _autocast(h.device.type) == h.dtype:
        return h
    return h.to(dtype)


torch.fx.wrap("to_carrier")
torch.fx.wrap("to_grid")
torch.fx.wrap("check_range")
torch.fx.wrap("to_branch")


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

    Branches compute in the type of their weights, or in autocast's.

    Attributes:
        grid: > 0 (a power of two) rounds what enters a run and every step in it to multiples of it. Sums of two
            multiples are exact as long as they stay below 2**24 grids in float32 (2**53 in float64), so at g = 1 the
            inverse subtracts to the bit what the forward has added.
        kind: what carries streams. `float32` (float64 where activations are); `bfloat16`: half of it, and a rounding
            per block, in both directions; `auto`: `float32`, but where branches compute in bfloat16 a 16-bit kind,
            unless 0 < g < 1: there the inverse multiplies rounding errors by 1/g per block.
    """

    grid: float = 0.0
    kind: StreamKind = "float32"

    def now(self, coupling: Callable[[], float], module: nn.Module) -> StreamType:
        """The same with the kind that `auto` stands for.

        Args:
            coupling: reads g.
            module: a block of the run, or the layer: its weights or autocast say in what branches compute.
        """
        if self.kind != "auto":
            return self
        narrow = self.grid == 0.0 and compute_type(module) == torch.bfloat16 and coupling() in (0.0, 1.0)
        return replace(self, kind="bfloat16" if narrow else "float32")

    def carry(self, x: Tensor) -> Tensor:
        """An activation in the carrier; its value as it is, if that holds it."""
        return to_carrier(x, self.kind)

    def enter(self, x: Tensor) -> Tensor:
        """The stream that an activation becomes where a run starts.

        Raises:
            UserError: see `check`.
        """
        return self.snap(self.carry(x))

    def snap(self, x: Tensor) -> Tensor:
        """A stream, or a step that is added to one, as streams hold it; the gradient passes straight through.

        Raises:
            UserError: see `check`.
        """
        if self.kind == "bfloat16":
            return to_carrier(x, self.kind)
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
        """The activation of a stream in the type that a module takes; as it is for one without weights."""
        weight = weight_of(module)
        return h if weight is None else to_branch(h, weight.dtype)

    def leave(self, h: Tensor, module: nn.Module) -> Tensor:
        """The activation behind a run, in the type that the module takes that the run is part of."""
        return self.for_branch(h, module)


FLOAT_STREAMS = StreamType()


def scripted_kind(kind: str, g: float, grid: float, dtype: torch.dtype) -> str:
    """`StreamType.now` for TorchScript, which knows no autocast: `dtype` is that of the activations."""
    if kind != "auto":
        return kind
    narrow = dtype == torch.bfloat16 and grid == 0.0 and (g <= 0.0 or g >= 1.0)
    return "bfloat16" if narrow else "float32"


def check_kind(kind: str) -> StreamKind:
    """Returns it.

    Raises:
        UserError: there is no such kind of streams.
    """
    for known in get_args(StreamKind):
        if kind == known:
            return known
    raise UserError(f"streams is {', '.join(map(repr, get_args(StreamKind)))}, not {kind!r}")


def compute_type(module: nn.Module) -> torch.dtype | None:
    """In what the operations of a module compute now: autocast's type, else its weights'; None without any."""
    weight = weight_of(module)
    return None if weight is None else _autocast(weight.device.type) or weight.dtype


def weight_of(module: nn.Module) -> Tensor | None:
    """A weight of a module, whatever wraps them: one that is representative of their type and device."""
    weight: Tensor | None = next((p for p in module.parameters() if p.is_floating_point()), None)
    if weight is None:  # none, or all of them plain attributes, as in DataParallel's replicas
        attributes = (value for m in module.modules() for value in vars(m).values())
        weight = next((x for x in attributes if isinstance(x, Tensor) and x.is_floating_point()), None)
    return weight


def _autocast(device: str) -> torch.dtype | None:
    return torch.get_autocast_dtype(device) if device != "meta" and torch.is_autocast_enabled(device) else None
