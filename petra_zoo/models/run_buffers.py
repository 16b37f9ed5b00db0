"""What a run of coupled blocks keeps beside its weights: the coupling, the gain, and the grid of its streams."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor, nn

from petra_zoo.errors import UserError
from petra_zoo.models.run_slices import RunSlices
from petra_zoo.reversible import COUPLING_STEPS, Coupling, StreamKind, StreamType, nearest_coupling, readable
from petra_zoo.reversible.reading import BufferReading
from petra_zoo.reversible.remainder import check_exact_coupling
from petra_zoo.reversible.saturation import Saturation
from petra_zoo.reversible.stream_type import check_kind, compute_type, inversions_in_a_row

FIXED_EXPONENT = 8  # of the default grid
LARGEST_GAIN = 4.0


class RunBuffers(RunSlices):
    """Blocks with a coupling, and with streams of some kind between them.

    Args:
        blocks: the modules.
        coupling: g; None: 1, and whatever a checkpoint says.
        grid: > 0: of float32 streams, for exact inversion.
        streams: what carries them.
        gain: s, where there `has_gain`; None: 1, and whatever a checkpoint says.
        has_gain: whether the gain is a buffer; else it is 1.
    """

    anchor_every = 0

    if TYPE_CHECKING:
        coupling: Tensor
        exponent: Tensor
        gain: Tensor

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        coupling: float | None,
        grid: float,
        streams: StreamKind,
        *,
        gain: float | None = None,
        has_gain: bool = False,
    ) -> None:
        super().__init__(*blocks)
        self.grid = grid
        self.kind: str  # TorchScript knows no literals
        self.set_streams(streams)
        # As it was built; and what a checkpoint has to say: that, or the last word since then. None: whatever it says.
        self.asked_for = self._required = coupling
        g = self._checked(1.0 if coupling is None else coupling)
        self._g = BufferReading(g, nearest_coupling)
        self._exponent = BufferReading(FIXED_EXPONENT, float)
        self._saturation = Saturation()
        weight = next(self.parameters(), torch.empty(()))
        self.register_buffer("coupling", torch.full((), g, device=weight.device, dtype=weight.dtype))
        self.register_buffer("exponent", torch.full((), FIXED_EXPONENT, device=weight.device, dtype=torch.int64))
        self.has_gain = has_gain
        self.asked_for_gain = self._required_gain = gain
        s = check_gain(1.0 if gain is None else gain)
        self._gain = BufferReading(s, nearest_gain)
        if has_gain:
            self.register_buffer("gain", torch.full((), s, device=weight.device, dtype=weight.dtype))

    # -- the streams ----------------------------------------------------------------------------------------------

    @torch.jit.unused
    def streams(self) -> StreamType:
        """The type of the streams between the layer's units: what `auto` stands for now is decided."""
        streams = StreamType(self.grid, check_kind(self.kind), saturation=self._saturation)
        streams = streams.now(lambda: self._g.latest(self.coupling), self)
        if streams.kind != "fixed16":
            return streams
        return replace(streams, fixed=2.0 ** -self._exponent.latest(self.exponent))

    @torch.jit.unused
    def set_streams(self, kind: StreamKind) -> None:
        """Chooses what carries the streams.

        Raises:
            UserError: no such kind, or one without a place for the grid of exact inversion.
        """
        if check_kind(kind) in ("bfloat16", "fixed16") and self.grid > 0.0:
            raise UserError("exact=True rounds float32 streams to a grid: leave streams out, or use exact=False")
        self.kind = kind

    @torch.jit.unused
    def set_exponent(self, exponent: int) -> None:
        """Sets the grid of fixed16 streams to 2**-exponent; not while micro-batches are in flight."""
        with torch.no_grad():
            self.exponent.fill_(exponent)
        self._exponent.value = float(exponent)

    @torch.jit.unused
    def check_streams(self) -> None:
        """Reads what the streams have seen of their grid's range: waits for the device.

        Raises:
            UserError: a value was beyond it.
        """
        self._saturation.check()

    @torch.jit.unused
    def spacing(self, units: int = 1) -> int:
        """Every so many blocks the streams of a run are kept; 0: never.

        That is `anchor_every`, but less where the inverse would be off by too much (see `inversions_in_a_row`).

        Args:
            units: in a block.
        """
        most = inversions_in_a_row(self._g.latest(self.coupling), self.streams(), compute_type(self))
        if most is None:
            return self.anchor_every
        bearable = max(1, most // units)
        return min(self.anchor_every, bearable) if self.anchor_every > 0 else bearable

    # -- the coupling ---------------------------------------------------------------------------------------------

    @torch.jit.unused
    def g(self) -> float:
        """The coupling as a number, read back from the buffer; on a GPU, only when its version tells that it changed.

        Writes through ``buffer.data`` change no version: a GPU's are seen after the next other write.

        Raises:
            ValueError: the buffer's value is not between 0 and 1.
        """
        return self._g.now(self.coupling)

    @torch.jit.unused
    def _coupling_now(self) -> Coupling:
        """g as a number where it can be read, else as a tensor.

        A compiled, traced or exported network reads the buffer each time it runs; torch.func's transforms put tensors
        in the buffer's place that have no single value.
        """
        buffer = self.coupling
        if readable(buffer) or buffer.is_meta:
            return self.g()
        g = buffer.to(torch.promote_types(buffer.dtype, torch.float32))
        return torch.round(g * COUPLING_STEPS) / COUPLING_STEPS

    @torch.jit.unused
    def set_coupling(self, g: float) -> None:
        """Sets g, a multiple of 1/256 in [0, 1]; on the grid of exact inversion 0 or 2**-m."""
        with torch.no_grad():
            self.coupling.fill_(self._checked(g))
        self._g.value = g
        self._required = None if self._required is None else g

    @torch.jit.unused
    def _checked(self, g: float) -> float:
        g = check_coupling(g)
        return check_exact_coupling(g) if self.grid > 0.0 else g

    @torch.jit.unused
    def _nearest(self, g: float) -> float:
        g = nearest_coupling(g)
        return check_exact_coupling(g) if self.grid > 0.0 else g

    @torch.jit.unused
    def take_any_coupling(self) -> None:
        """Lets a checkpoint replace coupling and gain: they were chosen or measured, and not asked for."""
        self.asked_for = self.asked_for_gain = self._required = self._required_gain = None

    @torch.jit.unused
    def reset_coupling(self) -> None:
        """Sets g as a newly built layer has it."""
        self.set_coupling(1.0 if self.asked_for is None else self.asked_for)
        self.set_exponent(FIXED_EXPONENT)
        if self.has_gain:
            self.set_gain(1.0 if self.asked_for_gain is None else self.asked_for_gain)

    # -- the gain -------------------------------------------------------------------------------------------------

    @torch.jit.unused
    def gain_now(self) -> float:
        """The gain that the run's blocks have, a number read as `g` is: 1 at g = 0, where blocks are ordinary ones."""
        return self._gain.now(self.gain) if self.has_gain and self.g() > 0.0 else 1.0

    @torch.jit.unused
    def _gain_or_tensor(self) -> Coupling:
        """`gain_now` where it can be read, else a tensor (see `_coupling_now`)."""
        if not self.has_gain:
            return 1.0
        if readable(self.gain) or self.gain.is_meta:
            return self.gain_now()
        gain = self.gain.to(torch.promote_types(self.gain.dtype, torch.float32))
        return torch.where(self.coupling > 0.0, torch.round(gain * COUPLING_STEPS) / COUPLING_STEPS, 1.0)

    @torch.jit.unused
    def set_gain(self, s: float) -> None:
        """Sets s, a multiple of 1/256 above 0; in bfloat16 those below 2 that are one of 1/128 alone are exact.

        Raises:
            UserError: it is none, or these blocks have no gain.
        """
        if not self.has_gain:
            raise UserError("these blocks keep no gain: scale the last affine of their branches by it")
        with torch.no_grad():
            self.gain.fill_(check_gain(s))
        self._gain.value = s
        self._required_gain = None if self._required_gain is None else s

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.g()  # on the meta device it could not be read any more
        if self.has_gain:
            self._gain.now(self.gain)
        self._exponent.now(self.exponent)
        return super()._apply(fn, recurse)

    # -- state ----------------------------------------------------------------------------------------------------

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Tensor],
        prefix: str,
        local_metadata: Mapping[str, int],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        before = len(error_msgs)
        self._complete(state_dict, prefix)
        g = self._loaded(state_dict, prefix + "coupling", self._nearest, error_msgs)
        s = self._loaded(state_dict, prefix + "gain", nearest_gain, error_msgs) if self.has_gain else None
        asked = [
            (g, self._required, "coupling", " (0: a plain network)"),
            (s, self._required_gain, "gain", ""),
        ]
        for value, wanted, name, note in asked:
            if wanted is not None and value is not None and value != wanted:
                error_msgs.append(
                    f"{prefix}{name} is {value:g} in the checkpoint{note}, but the model was built with "
                    f"{name}={wanted:g}: leave {name} out, or convert the checkpoint"
                )
        if len(error_msgs) > before:
            return
        if g is not None:
            self._g.value = g
        if s is not None:
            self._gain.value = s
        exponent = state_dict.get(prefix + "exponent")
        if exponent is not None and not exponent.is_meta:
            self._exponent.value = float(exponent)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    @torch.jit.unused
    def _complete(self, state_dict: dict[str, Tensor], prefix: str) -> None:
        """Adds what a state dict that is older than a buffer, or a plain network's, lacks."""
        if not self._is_in(state_dict, prefix):
            return
        key = prefix + "coupling"
        if key not in state_dict:
            # A plain network's blocks: its function. On the weights' device: with assign=True it stays there.
            like = next(value for name, value in state_dict.items() if name.startswith(prefix))
            state_dict[key] = torch.zeros((), device=like.device, dtype=self.coupling.dtype)
        if prefix + "exponent" not in state_dict:
            state_dict[prefix + "exponent"] = torch.full_like(state_dict[key], FIXED_EXPONENT, dtype=torch.int64)
        if self.has_gain and prefix + "gain" not in state_dict:
            state_dict[prefix + "gain"] = torch.ones_like(state_dict[key])

    @torch.jit.unused
    def _loaded(
        self, state_dict: dict[str, Tensor], key: str, nearest: Callable[[float], float], error_msgs: list[str]
    ) -> float | None:
        """A number of a state dict, put right there: an average of two is off by a rounding error, or in between."""
        if key not in state_dict or state_dict[key].is_meta:
            return None
        try:
            value = nearest(float(state_dict[key]))
        except ValueError as error:
            error_msgs.append(f"{key}: {error}")
            return None
        state_dict[key] = torch.full_like(state_dict[key], value)
        return value

    @torch.jit.unused
    def _is_in(self, state_dict: dict[str, Tensor], prefix: str) -> bool:
        """Whether a state dict holds most of the layer's weights, and of its buffers too where there are some.

        One that holds parameters alone, or a few of them, says nothing of the coupling.
        """
        parameters = {name for name, _ in self.named_parameters()}
        kept = self.state_dict().keys() - {"coupling", "exponent", "gain"}  # without buffers that are made anew
        found = [[prefix + name in state_dict for name in names] for names in (parameters, kept - parameters)]
        return any(found[0]) and all(2 * sum(part) >= len(part) for part in found)


def check_coupling(g: float) -> float:
    """Returns g.

    Raises:
        UserError: g is not a multiple of 1/256 in [0, 1].
    """
    if not (0.0 <= g <= 1.0 and g * COUPLING_STEPS == int(g * COUPLING_STEPS)):
        raise UserError(f"a coupling is a multiple of 1/256 between 0 and 1, not {g!r}")
    return float(g)


def nearest_gain(s: float) -> float:
    """The multiple of 1/256 nearest to a gain (see `nearest_coupling`).

    Raises:
        ValueError: it is not between 1/256 and 4.
    """
    steps = round(s * COUPLING_STEPS) if math.isfinite(s) else 0
    if not 1 <= steps <= LARGEST_GAIN * COUPLING_STEPS:
        raise ValueError(f"a gain lies between 1/{COUPLING_STEPS} and {LARGEST_GAIN:g}, not at {s!r}")
    return steps / COUPLING_STEPS


def check_gain(s: float) -> float:
    """Returns s.

    Raises:
        UserError: it is not a multiple of 1/256 between 1/256 and 4.
    """
    if not (0.0 < s <= LARGEST_GAIN and s * COUPLING_STEPS == int(s * COUPLING_STEPS)):
        raise UserError(f"a gain is a multiple of 1/{COUPLING_STEPS} above 0, {LARGEST_GAIN:g} at most, not {s!r}")
    return float(s)
