"""The type of streams: what carries them, which grid they lie on, how they come in and how they go out."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from petra_zoo.errors import UserError
from petra_zoo.reversible import fixed_point, packed
from petra_zoo.reversible.reading import Coupling, readable
from petra_zoo.reversible.rectified import merge_rectified
from petra_zoo.reversible.remainder import check_exact_coupling, dropped_bits, pack_bits, unpack_bits
from petra_zoo.reversible.saturation import Saturation

StreamKind = Literal["auto", "float32", "bfloat16", "fixed16"]
FIXED_GRID = 2.0**-8  # of fixed16, from -128 to 128, unless a network's magnitudes are known

# These look at a tensor's type: torch.fx must not trace into them, TorchScript calls `to_carrier` as it is (it knows no
# `StreamType`), and nobody else but `StreamType` does.


def to_carrier(x: Tensor, kind: str = "float32") -> Tensor:
    """An activation in what carries streams of a kind; float32: in at least that, so that float64 keeps what it has."""
    if kind == "fixed16":  # on the grid inside runs alone
        return x
    if kind == "bfloat16":
        return x.to(torch.bfloat16)
    return widened(x)


def widened(x: Tensor) -> Tensor:
    """x in float32, or float64."""
    if x.dtype == torch.float64:
        return x
    return x.float()


def to_branch(h: Tensor, dtype: torch.dtype) -> Tensor:
    """An activation for weights of a type; one that autocast would give stays, operations take it as it is."""
    if torch.jit.is_scripting():  # it knows no autocast
        return h.to(dtype)
    return h if _autocast(h.device.type) == h.dtype else h.to(dtype)


torch.fx.wrap("to_carrier")
torch.fx.wrap("widened")
torch.fx.wrap("to_branch")


@dataclass(frozen=True)
class StreamType:
    """The type of the streams of a run. The one place that knows it; units, blocks, layers and networks ask here.

    Branches compute in the type of their weights, or in autocast's. On a grid, what enters a run and every step in it
    are rounded to multiples of a power of two. Sums of two multiples are exact as long as they are in range, so at
    g = 1 the inverse subtracts to the bit what the forward has added, and at g = 2**-m, whose part of a stream is
    rounded down, with the remainder of that.

    Attributes:
        grid: > 0: the grid of float32 streams, whose range are 2**24 steps of it (2**53 in float64); for g = 2**-m.
        kind: what carries streams. `float32` (float64 where activations are); `bfloat16`: half of it, and a rounding
            per block, in both directions; `fixed16`: a grid in 16 bits, for g = 2**-m (at g = 0, where nothing is
            inverted, `bfloat16`); `auto`: `float32`, but `bfloat16` where branches compute in it and g is 1 or 0.
            Between them the inverse multiplies rounding errors by 1/g per block.
        fixed: the grid of `fixed16`, whose range are 32767 steps of it.
        packed: whether `fixed16` streams are bits, as between units, or floats on the grid, which any operation
            understands. The bits of what is computed from them are the same.
        saturation: where it is noted what the streams have seen of a grid's range.
    """

    grid: float = 0.0
    kind: StreamKind = "float32"
    fixed: float = FIXED_GRID
    packed: bool = True
    saturation: Saturation = field(default_factory=Saturation, compare=False)

    def now(self, coupling: Callable[[], float], module: nn.Module) -> StreamType:
        """The same with the kind that holds now.

        Args:
            coupling: reads g.
            module: a block of the run, or the layer: its weights or autocast say in what branches compute.

        Raises:
            UserError: a grid, and a coupling above 0 that is no 2**-m.
        """
        if self.grid > 0.0 or self.kind == "fixed16":
            check_exact_coupling(coupling())
        if self.kind in ("float32", "bfloat16"):
            return self
        if self.kind == "auto" and (self.grid > 0.0 or compute_type(module) != torch.bfloat16):
            return replace(self, kind="float32")
        g = coupling()
        if self.kind == "fixed16":
            return self if g > 0.0 else replace(self, kind="bfloat16")
        # The rounding of a branch in bfloat16 outweighs that of a stream: a grid, which costs more, is not the default.
        return replace(self, kind="bfloat16" if g in (0.0, 1.0) else "float32")

    @property
    def on_grid(self) -> bool:
        """Whether streams lie on a grid now, so that g = 2**-m has an exact inverse."""
        return self._spacing > 0.0

    def as_floats(self) -> StreamType:
        """The same for plain operations: tracers and hooks see numbers."""
        return replace(self, packed=False)

    # -- in and out -----------------------------------------------------------------------------------------------

    def carry(self, x: Tensor) -> Tensor:
        """An activation outside of a run; its value as it is, if that holds it."""
        return to_carrier(x, self.kind)

    def enter(self, x: Tensor) -> Tensor:
        """The stream that an activation becomes where a run starts.

        Raises:
            UserError: see `Saturation`.
        """
        return self.snap(self.carry(x))

    def read(self, b: Tensor) -> Tensor:
        """A stream as a number."""
        return packed.unpack(b, self.fixed) if self._bits else b

    def activated(self, b: Tensor, activate: Callable[[Tensor], Tensor], branch: nn.Module | None = None) -> Tensor:
        """The activation act(b) of a stream.

        Args:
            b: the stream.
            activate: act; one that says that it `rectifies` is relu.
            branch: that takes it; for it, the activation of a stream on a grid is in the type that it takes.
        """
        if self._bits and rectifies(activate):
            return packed.rectify(b, self.fixed, self._type_of(branch))
        h = activate(self.read(b))
        return self.for_branch(h, branch) if self.kind == "fixed16" and branch is not None else h

    def activation_in_front(
        self, activate: Callable[[Tensor], Tensor], branch: nn.Module
    ) -> tuple[Callable[[Tensor], Tensor], bool]:
        """`activated` for a branch as a function of the stream, and whether it is relu of numbers in their own type."""
        return partial(self.activated, activate=activate, branch=branch), rectifies(activate) and self.kind != "fixed16"

    def mean_rectified(self, b: Tensor, a: Tensor, module: nn.Module) -> Tensor:
        """(relu(b) + relu(a)) / 2 of two streams; of packed ones, in the type that a module takes."""
        if self._bits:
            return packed.mean_rectified(b, a, self.fixed, self._type_of(module))
        return merge_rectified(b, a)

    def for_branch(self, h: Tensor, module: nn.Module) -> Tensor:
        """The activation of a stream in the type that a module takes; as it is for one without weights."""
        if self.kind == "fixed16":
            dtype = compute_type(module)
            return h if dtype is None else h.to(dtype)
        weight = weight_of(module)
        return h if weight is None else to_branch(h, weight.dtype)

    def shortcut(self, h: Tensor, module: nn.Module) -> Tensor:
        """An activation as it is added to the output of a module that takes it; on a grid, what the module takes."""
        return self.for_branch(h, module) if self.kind == "fixed16" else self.carry(h)

    def leave(self, h: Tensor, module: nn.Module) -> Tensor:
        """The activation behind a run, in the type that the module takes that the run is part of."""
        return self.for_branch(h, module)

    # -- sums -----------------------------------------------------------------------------------------------------

    def snap(self, x: Tensor) -> Tensor:
        """A stream, or a step that is added to one, as streams hold it; the gradient passes straight through.

        Raises:
            UserError: see `Saturation`.
        """
        if self._bits:
            return packed.pack(x, self.fixed, self._witness(x))
        if self.kind == "fixed16":
            x = widened(x)
            return fixed_point.to_grid(x, self.fixed, packed.MOST, self._witness(x))
        if self.kind == "bfloat16":
            return to_carrier(x, self.kind)
        return fixed_point.to_grid(x, self.grid, fixed_point.largest(x), self._witness(x)) if self.grid > 0.0 else x

    def precise(self, h: Tensor) -> Tensor:
        """An activation as it takes part in a step: fixed16 has it in the type that the branch takes."""
        return widened(h) if self.kind == "fixed16" else h

    def sum_at_0(self, h: Tensor, f: Tensor) -> Tensor:
        """h + F(h), rounded: where there is no second stream."""
        if self._bits:
            return packed.pack_sum(h, f, self.fixed, self._witness(f))
        return self.snap(self.precise(h) + f)

    def sum_on_grid(self, step: Tensor, a: Tensor, g: Coupling) -> Tensor:
        """snap(step) + g * a, its last term rounded down to the grid, in range."""
        if self._bits:
            assert not isinstance(g, Tensor), "packed streams are for who may look at values"
            return packed.add(step, a, self.fixed, self._witness(step), dropped_bits(g) or 0)
        whole = not isinstance(g, Tensor) and g == 1.0
        return self.in_range(self.snap(step) + (a if whole else fixed_point.part_of(a, self._spacing, g)))

    def checks(self, g: float) -> bool:
        """Whether branches are to be recomputed to the bit, and looked at; fixed16 at g = 1 loses a step where not."""
        return self.on_grid and g > 0.0 and (self.kind == "float32" or g < 1.0)

    def remainder(self, a: Tensor, g: float) -> Tensor | None:
        """What g = 2**-m drops of a stream, packed, uint8 [...]: the inverse needs it; None: nothing is dropped."""
        bits = dropped_bits(g) if self.on_grid else None
        if not bits:
            return None
        whole = packed.as_integers(a) if self._bits else fixed_point.whole_steps(a, self._spacing)
        low = whole.to(torch.uint8)  # modulo 256, below zero as well
        return pack_bits(low.bitwise_and_(2**bits - 1), bits)

    def restored(self, b_out: Tensor, step: Tensor, g: float, remainder: Tensor, over: bool = False) -> Tensor:
        """The stream a of b' = snap(step) + g * a: the inverse of `sum_on_grid`; `over`: it is written over b'."""
        bits = dropped_bits(g) or 0
        low = unpack_bits(remainder, bits, b_out.shape)
        if self._bits:
            return packed.restore_bits(b_out, step, low, bits, over)
        return self.difference(b_out, step, over).div_(g).add_(low, alpha=self._spacing)

    def difference(self, b_out: Tensor, step: Tensor, over: bool = False) -> Tensor:
        """b' less the rounded step: at g = 1 the stream a; `over`: it is written over b'."""
        if self._bits:
            return packed.subtract(b_out, step, over)
        return b_out.sub_(step) if over else b_out - step

    def in_range(self, b: Tensor) -> Tensor:
        """A sum of two values on the grid, which may be one that streams cannot hold: saturated, and noted.

        Compiled, exported and vectorised networks are not inverted, and note nothing.

        Raises:
            UserError: see `Saturation`.
        """
        if self.kind == "fixed16":
            return fixed_point.saturated(b, self.fixed, packed.MOST, self._witness(b))
        if self.kind == "float32" and self.grid > 0.0:
            return fixed_point.saturated(b, self.grid, fixed_point.largest(b), self._witness(b))
        return b

    def _type_of(self, module: nn.Module | None) -> torch.dtype:
        return (None if module is None else compute_type(module)) or torch.float32

    @property
    def _spacing(self) -> float:
        return self.fixed if self.kind == "fixed16" else self.grid if self.kind == "float32" else 0.0

    @property
    def _bits(self) -> bool:
        return self.packed and self.kind == "fixed16"

    def _witness(self, x: Tensor) -> Saturation | None:
        return self.saturation if readable(x) else None


FLOAT_STREAMS = StreamType()
# By how much inverses may multiply a rounding between two anchors. In 16 bits until a branch makes noise of it that
# counts beside its own, and how many inverses there may be in a row, for that noise adds up as well (benchmarks/exact:
# bfloat16; float16 by its bits). In float32 and float64 until a gradient is off by about a thousandth of what it is.
_ERROR_BORNE = {torch.bfloat16: 2.0**12, torch.float16: 2.0**15, torch.float32: 2.0**14, torch.float64: 2.0**43}
_ERROR_BORNE_BY_STREAMS = 2.0  # in bfloat16 themselves
_MOST_IN_A_ROW = {torch.bfloat16: 8, torch.float16: 8}


def rectifies(activate: Callable[[Tensor], Tensor]) -> bool:
    """Whether an activation is known to be relu."""
    return bool(getattr(activate, "rectifies", False))


def scripted_kind(kind: str, g: float, grid: float, dtype: torch.dtype) -> str:
    """`StreamType.now` for TorchScript, which knows no autocast: `dtype` is that of the activations."""
    if kind == "fixed16":
        return "bfloat16" if g == 0.0 else kind
    if kind != "auto":
        return kind
    if dtype != torch.bfloat16 or grid > 0.0:
        return "float32"
    return "bfloat16" if g == 0.0 or g == 1.0 else "float32"


def scripted_snap(x: Tensor, kind: str, grid: float) -> Tensor:
    """`StreamType.snap` for TorchScript, of floats."""
    if kind == "bfloat16":
        return to_carrier(x, kind)
    if grid > 0.0:
        x = widened(x)
        return fixed_point.rounded(x, grid, 32767.0 if kind == "fixed16" else fixed_point.largest(x))
    return x


def scripted_sum(step: Tensor, a: Tensor, g: Coupling, kind: str, grid: float) -> Tensor:
    """`StreamType.sum_on_grid` for TorchScript, of a step that is rounded; without a grid, step + g * a."""
    if grid > 0.0:
        x = step + fixed_point.floored(a, grid, g)
        return fixed_point.clamped(x, grid, 32767.0 if kind == "fixed16" else fixed_point.largest(x))
    return step + g * a


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


def inversions_in_a_row(g: float, streams: StreamType, computes: torch.dtype | None) -> int | None:
    """How many units can be inverted from one another's outputs; None: any number.

    An inverse divides by g what b' is off by and what the branch is off by for it: up to 1 + 1/g per unit. A branch in
    16 bits of an activation that is off by a little rounds differently in places: it is off by its own rounding at
    once, which the next inverses divide by g, and behind a few units at a small g there is as much noise as gradient.
    On a grid nothing is off, and at g = 1 nothing grows.

    Args:
        g: the coupling.
        streams: their type now.
        computes: the type in which branches compute.
    """
    if computes is None or computes not in _ERROR_BORNE or streams.on_grid or not 0.0 < g < 1.0:
        return None
    borne = _ERROR_BORNE_BY_STREAMS if streams.kind == "bfloat16" else _ERROR_BORNE[computes]
    growth = 1 / g if computes in _MOST_IN_A_ROW else 1 + 1 / g
    bearable = max(1, math.floor(math.log(borne) / math.log(growth) + 1e-9))
    return min(bearable, _MOST_IN_A_ROW.get(computes, bearable))


def weight_of(module: nn.Module) -> Tensor | None:
    """A weight of a module, whatever wraps them: one that is representative of their type and device."""
    weight: Tensor | None = next((p for p in module.parameters() if p.is_floating_point()), None)
    if weight is None:  # none, or all of them plain attributes, as in DataParallel's replicas
        attributes = (value for m in module.modules() for value in vars(m).values())
        weight = next((x for x in attributes if isinstance(x, Tensor) and x.is_floating_point()), None)
    return weight


def _autocast(device: str) -> torch.dtype | None:
    # A meta weight is of another rank, which computes under the same autocast: its streams come in here.
    if device == "meta":
        device = "cuda" if torch.is_autocast_enabled("cuda") else "cpu"
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
