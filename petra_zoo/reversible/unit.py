"""Units: the smallest things that can be scheduled, and the one primitive that goes backwards through them.

A unit takes streams and gives streams; the stem takes images, the head gives logits. Streams are a tuple of tensors
of any layout whose first dimension is the batch ([B, C, H, W], [B, T, C], ...): (b,) before a run and behind a unit
without an inverse, (b, a) inside a run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from petra_zoo.reversible.activation import Activation
from petra_zoo.reversible.checksum import checksum
from petra_zoo.reversible.coupling import coupled, step_of, uncouple
from petra_zoo.reversible.parts import PartedBranch
from petra_zoo.reversible.saturation import Saturation
from petra_zoo.reversible.state import ModuleState
from petra_zoo.reversible.stream_type import FLOAT_STREAMS, StreamType
from petra_zoo.reversible.vector_jacobian import Gradients, Wanted, edge_of, gradients_of, require_known_reads

Streams = tuple[Tensor, ...]
Residue = tuple[Tensor, ...]


class Evaluation(NamedTuple):
    """What a unit's forward gives: its streams, and what its reversal needs beside them."""

    streams: Streams
    residue: Residue = ()


class Reversal(NamedTuple):
    """What going backwards through a unit yields: its input, the gradient of its input and of its parameters."""

    inputs: Streams
    input_gradients: Gradients
    parameter_gradients: Gradients  # in the order of the parameters asked for


class Unit(nn.Module):
    """A unit without an inverse: going backwards needs its input.

    Args:
        name: where the unit sits in its model, for example ``layer2.0``.
        anchor: whether its input is kept although it could be reconstructed (a long run loses accuracy otherwise).

    Attributes:
        outside: modules that are no part of the unit, of which it reads the mode and the buffers of their own: its
            model, and layers for their coupling. To be set before the first use.
        same_parameters: whether its second evaluation sees the parameters and the generator of the first one, so that
            one that is to be exact can be looked at. An engine whose parameters change in between says no.
        frugal: whether memory may peak in its backward, which then rather computes h twice; who knows better says no.
    """

    def __init__(self, name: str, anchor: bool = False) -> None:
        super().__init__()
        self.name = name
        self.anchor = anchor
        self.outside: Sequence[nn.Module] = ()
        self.same_parameters = True
        self.frugal = True
        self._state: ModuleState | None = None

    @property
    def state(self) -> ModuleState:
        """Where the unit's modules keep tensors; found at the first use and then known."""
        if self._state is None:
            self._state = ModuleState(self, self.outside)
        return self._state

    def untouched(self) -> AbstractContextManager[None]:
        """Inside, evaluating the unit changes no buffer (batch norms in train mode use batch statistics)."""
        return self.state.untouched()

    @property
    def reversible(self) -> bool:
        """Whether the unit has an inverse now (a coupling of 0 has none)."""
        return False

    @property
    def needs_same_parameters(self) -> bool:
        """Whether it has an inverse only as long as `same_parameters` holds."""
        return False

    def forward(self, *streams: Tensor) -> Streams:
        raise NotImplementedError

    def evaluate(self, *streams: Tensor) -> Evaluation:
        """The forward of a training step: streams, and what `reverse` needs beside them (by default nothing)."""
        return Evaluation(self(*streams))

    def values(self, streams: Streams) -> Streams:
        """The streams that the unit gave as numbers, for whoever looks at them (see `StreamType.read`)."""
        return streams

    def saturation(self) -> Saturation | None:
        """Where it is noted what the unit's streams have seen of the range of their grid."""
        return None

    def reverse(
        self,
        outputs: Streams,
        output_gradients: Gradients,
        parameters: Sequence[Tensor],
        residue: Residue = (),
        *,
        owned: bool = False,
    ) -> Reversal:
        """Backwards through the unit from its *output*; a unit that is ever `reversible` has it.

        Args:
            outputs: the streams the unit gave, exact or reconstructed.
            output_gradients: their gradients; None counts as zero.
            parameters: the parameters whose gradients are wanted.
            residue: what `evaluate` gave beside the outputs.
            owned: the caller has no further use for outputs and gradients, which share no memory: the unit may write
                over them. Gradients of parameters never share memory with those of streams.
        """
        raise NotImplementedError(f"{type(self).__name__} {self.name} has no inverse")

    def recompute(
        self,
        inputs: Streams,
        output_gradients: Gradients,
        parameters: Sequence[Tensor],
        needs_input_gradient: bool = True,
        *,
        owned: bool = False,
    ) -> Reversal:
        """Backwards through the unit from its *input*: one more evaluation, statistics untouched.

        Args:
            inputs: the streams the unit received; they are given back as they are.
            output_gradients: gradients of the streams it gave; None counts as zero.
            parameters: the parameters whose gradients are wanted.
            needs_input_gradient: False for the stem, whose input is data.
            owned: the caller has no further use for the output gradients: the unit may write over them.
        """
        leaves = tuple(x.detach().requires_grad_(needs_input_gradient and x.is_floating_point()) for x in inputs)
        wanted = [x for x in leaves if x.requires_grad]
        with self.untouched():  # the gradients too: a checkpoint inside the unit evaluates its part once more
            with torch.enable_grad():
                outputs = [edge_of(y) for y in self(*leaves)]  # nobody needs their values
            require_known_reads(next(self.children(), self), self.name, outputs, self.state, [*wanted, *parameters])
            gradients = gradients_of(outputs, output_gradients, [*wanted, *parameters])
        of_inputs = iter(gradients[: len(wanted)])
        return Reversal(
            inputs, tuple(next(of_inputs) if x.requires_grad else None for x in leaves), gradients[len(wanted) :]
        )


class FunctionUnit(Unit):
    """A unit made of a model's own modules and a function over them: stems, heads, down-sampling blocks.

    Args:
        name: the unit's place in its model.
        function: streams -> streams; calls the modules below and nothing else that has parameters.
        modules: the modules whose parameters and statistics belong to this unit, by their name in the model.
        streams: reads the type of the streams that it gives; None: they are numbers.
    """

    def __init__(
        self,
        name: str,
        function: Callable[..., Streams],
        modules: dict[str, nn.Module],
        streams: Callable[[], StreamType] | None = None,
    ) -> None:
        super().__init__(name)
        self.function = function
        self.streams = streams
        for path, module in modules.items():
            self.add_module(path.replace(".", "_"), module)

    def forward(self, *streams: Tensor) -> Streams:
        return self.function(*streams)

    def values(self, streams: Streams) -> Streams:
        return streams if self.streams is None else tuple(map(self.streams().read, streams))

    def saturation(self) -> Saturation | None:
        return None if self.streams is None else self.streams().saturation


def no_gain() -> float:
    """The gain of branches that are what they were trained as."""
    return 1.0


class CoupledUnit(Unit):
    """A coupled block: b' = (1-g)*h + g*a + s*F(h), a' = b, with h = act(b).

    Given one stream it starts a run: a = h, so that b' = h + F(h), the ordinary residual block, without a gain.
    At g = 0, where it is that too, the second stream has no part in the function and is neither taken nor given.

    Args:
        name: the unit's place in its model.
        block: holds the branch's parameters.
        branch: F, block's own method or a function over it; takes h, gives a tensor of the same shape. Of a whole
            block it is B = id + F.
        activate: act; must not write into its argument and has no parameters of its own.
        coupling: reads g.
        starts: whether the block starts its run, that is, takes one stream.
        anchor: see `Unit`.
        streams: their type, or what reads it; on a grid, the streams that enter must lie on it (exact inversion).
        gain: reads s.
        whole: whether the branch is a whole block.
    """

    def __init__(
        self,
        name: str,
        block: nn.Module,
        *,
        branch: Callable[[Tensor], Tensor],
        activate: Callable[[Tensor], Tensor],
        coupling: Callable[[], float],
        starts: bool = False,
        anchor: bool = False,
        streams: StreamType | Callable[[], StreamType] = FLOAT_STREAMS,
        gain: Callable[[], float] = no_gain,
        whole: bool = False,
    ) -> None:
        super().__init__(name, anchor)
        self.block = block
        self.branch = branch
        self.activate = activate
        self.coupling = coupling
        self.starts = starts
        self.streams = streams
        self.gain = gain
        self.whole = whole

    @property
    def reversible(self) -> bool:
        return self.coupling() > 0.0

    @property
    def needs_same_parameters(self) -> bool:
        return not self.starts and 0.0 < self.coupling() < 1.0 and self._streams_type().on_grid

    def forward(self, *streams: Tensor) -> Streams:
        return self._couple(streams, self.coupling(), self._streams_type())[0]

    def evaluate(self, *streams: Tensor) -> Evaluation:
        """The forward; the residue is what g drops of a, and the branch's checksum, where there are any."""
        g, streams_type = self.coupling(), self._streams_type()
        if self.starts or not (g > 0.0 and streams_type.on_grid):
            return super().evaluate(*streams)
        outputs, f = self._couple(streams, g, streams_type)
        seen = (checksum(f),) if self.same_parameters and streams_type.checks(g) else ()
        del f
        remainder = streams_type.remainder(streams[1], g)
        return Evaluation(outputs, seen if remainder is None else (remainder, *seen))

    def _couple(self, streams: Streams, g: float, streams_type: StreamType) -> tuple[Streams, Tensor]:
        b = streams[0]
        a = None if self.starts or g == 0.0 else streams[1]
        h = streams_type.activated(b, self.activate, self.block)
        f = self._branch_of(h, streams_type)
        b_out = coupled(h, f, a, g, streams_type, self.gain(), self.whole)
        return ((b_out, b) if g > 0.0 else (b_out,)), f  # a' = b; at g = 0 nobody would read it

    def values(self, streams: Streams) -> Streams:
        return tuple(map(self._streams_type().read, streams))

    def saturation(self) -> Saturation | None:
        return self._streams_type().saturation

    def _streams_type(self) -> StreamType:
        return self.streams.now(self.coupling, self.block) if isinstance(self.streams, StreamType) else self.streams()

    def _branch_of(self, h: Tensor, streams_type: StreamType) -> Tensor:
        return self.branch(streams_type.for_branch(h, self.block))

    def reverse(
        self,
        outputs: Streams,
        output_gradients: Gradients,
        parameters: Sequence[Tensor],
        residue: Residue = (),
        *,
        owned: bool = False,
    ) -> Reversal:
        """Backwards through the block from its *output* (b', a'), with a single evaluation of F.

        The primitive of reversible backpropagation and of PETRA: F's graph is built once, its value inverts the
        block and its vector-Jacobian product gives the gradients. One forward and one backward of F in all.

        At the peak stands F's last layer, its input and output, beside two streams and their gradients: h is let go of
        meanwhile, F's value as soon as a is known; where all are `owned` a is written over b', and d_b over d_a'.
        """
        g, gain = self.coupling(), 1.0 if self.starts else self.gain()
        streams_type = self._streams_type()
        b_out, a_out = outputs  # [B, ...] each; a' = b: this half of the inverse is a copy
        d_b_out, d_a_out = output_gradients
        act, is_relu = streams_type.activation_in_front(self.activate, self.block)
        activation = Activation(act, a_out, is_relu, self.frugal)
        # PETRA's Eq. 5 goes on with a = b' - F(b), RevNet's backward (Gomez et al., Algorithm 1) takes the gradients
        # from the same evaluation. A second one would cost a fourth of the step, and be the same number under PETRA.
        with self.untouched():  # as in `recompute`
            value, gradients = self._pull(activation, streams_type, gain, d_b_out, parameters)
            inputs: Streams = (a_out,)  # of a block that starts its run: the one stream b
            if not self.starts:
                h = value if g == 1.0 and not self.whole else activation.value()  # no part of the step at g = 1
                step = step_of(h, value, g, streams_type, gain, self.whole)
                del h
                remainder = self._look(value, residue, g, streams_type)
                # Without a remainder it divides by g, and so do rounding errors.
                a = uncouple(b_out, step, g, streams_type, remainder=remainder, over=owned)
                inputs = (a_out, a)
                del step
            del value
            d_h, *d_parameters = gradients()
            # (1 - g) * h, or h where a = h, is the part of b' beside s * F(h) and g * a; F = B - id of a whole block.
            beside = (1.0 if self.starts else 1.0 - g) - (gain if self.whole else 0.0)
            d_h = _sum(d_h, _times(beside, d_b_out))
            # b went two ways: through h, and, as it is, into a'.
            d_b = d_a_out if d_h is None else activation.gradient(d_h, d_a_out, over=owned)
        if self.starts:
            return Reversal(inputs, (d_b,), tuple(d_parameters))
        return Reversal(inputs, (d_b, _times(g, d_b_out)), tuple(d_parameters))

    def _pull(
        self,
        activation: Activation,
        streams_type: StreamType,
        gain: float,
        d_b_out: Tensor | None,
        parameters: Sequence[Tensor],
    ) -> tuple[Tensor, Callable[[], Gradients]]:
        """F(h), and what gives the gradients of h and the parameters; a branch in parts has them with its value."""
        if isinstance(self.branch, PartedBranch) and (d_f := _times(gain, d_b_out)) is not None:
            h = streams_type.for_branch(activation.give(), self.block)
            value, d_h, d_parameters = self.branch.pull(h.detach(), d_f, parameters)
            of_h = (d_h,) if h.is_leaf else gradients_of((h,), (d_h,), [activation.start])
            return value, lambda: (*of_h, *d_parameters)
        with torch.set_grad_enabled(d_b_out is not None), activation.forgetting():
            # No name is bound to h, here or in a function between: only so it dies inside of the branch.
            f = self.branch(streams_type.for_branch(activation.give(), self.block))
        graph = edge_of(f)
        wanted: list[Wanted] = [activation.start, *parameters]
        require_known_reads(self.block, self.name, [graph], self.state, wanted)
        return f.detach(), lambda: gradients_of((graph,), (_times(gain, d_b_out),), wanted)

    def _look(self, f: Tensor, residue: Residue, g: float, streams_type: StreamType) -> Tensor | None:
        """What g has dropped, from a residue; looks whether F(h) has the bits of the forward where it tells of them."""
        drops = 1 if streams_type.on_grid and g < 1.0 else 0
        if len(residue) < drops:
            raise RuntimeError(f"{self.name} is exact at coupling {g:g} with the residue that its evaluate gave alone")
        for then in residue[drops:]:
            streams_type.saturation.compare(self.name, then, checksum(f))
        return residue[0] if drops else None


def _times(factor: float, d: Tensor | None) -> Tensor | None:
    """None stands for zero."""
    if d is None or factor == 0.0:
        return None
    return d if factor == 1.0 else factor * d


def _sum(x: Tensor | None, y: Tensor | None) -> Tensor | None:
    """None stands for zero."""
    if x is None or y is None:
        return y if x is None else x
    return x + y
