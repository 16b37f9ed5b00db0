"""Backpropagation through units without stored activations.

A *segment* is a run of reversible units, or a single unit without an inverse. Of a run only the final streams are
stored (the pairs at anchors too, and the residues of units that have any), of any other unit its input. The backward
pass walks the units in reverse through the primitives of `unit.py` and returns parameter gradients from the autograd
Function, so that DistributedDataParallel, tensor hooks and torch.autograd.grad see what they see with plain
backpropagation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from petra_zoo.reversible.hooks import stand_ins
from petra_zoo.reversible.ownership import Lent, storage_of
from petra_zoo.reversible.plain_path import operations_are_wanted
from petra_zoo.reversible.replay import Replay
from petra_zoo.reversible.state import Held, version_of
from petra_zoo.reversible.unit import Evaluation, Streams, Unit
from petra_zoo.reversible.vector_jacobian import Gradients


def segments(units: Sequence[Unit], reconstruct: bool = True) -> Iterator[list[Unit]]:
    """Splits units into runs and single units.

    Args:
        units: in the order in which they run.
        reconstruct: False treats every unit as having no inverse (activation checkpointing by units).
    """
    for reversible, group in groupby(units, key=lambda unit: reconstruct and unit.reversible):
        if reversible:
            yield list(group)
        else:
            yield from ([unit] for unit in group)


def backpropagate(units: Sequence[Unit], streams: Streams, *, reconstruct: bool = True, kept: int = 0) -> Streams:
    """Runs units in order; the backward pass reconstructs runs and recomputes the other units.

    Computes exactly what calling the units one after the other computes, batch-norm statistics included; without
    gradients, under a compiler, an exporter, a tracer or a transform of functions it is that.

    Args:
        units: what to run; a parameter may appear in several of them.
        streams: input of the first unit.
        reconstruct: False stores every unit's input and recomputes all of them.
        kept: how many units at the end keep their graph instead (see `kept_units`).

    Returns:
        The last unit's output.
    """
    if operations_are_wanted():
        for unit in units:
            streams = unit(*streams)
        return streams
    lent = [storage_of(x) for x in streams]
    first, first_kept = first_to_go_backward(units, streams), len(units) - kept
    for unit in units[:first]:
        streams = unit(*streams)
    parts = list(segments(units[first:first_kept], reconstruct))
    given = [_bytes_of(streams)]
    for segment in parts:
        held = [Held(unit.state) for unit in segment]
        parameters = [h.trainable() for h in held]
        flat = [p for group in parameters for p in group]
        reverse = reconstruct and segment[0].reversible
        place = _Place([len(group) for group in parameters], reverse, len(streams), segment is parts[-1], lent)
        streams = _Segment.apply(segment, held, place, *streams, *flat)
        given.append(_bytes_of(streams))
    for segment, in_front, behind in zip(parts, given, given[1:], strict=False):
        for unit in segment:
            unit.frugal = 2 * max(in_front, behind) > max(given[1:])
    for unit in units[first_kept:]:
        streams = unit(*streams)
    return streams


def _bytes_of(streams: Streams) -> int:
    return sum(x.nbytes for x in streams)


def first_to_go_backward(units: Sequence[Unit], streams: Streams) -> int:
    """Index of the first unit that a backward pass comes to: below it nothing is trained, and no gradient is wanted."""
    if any(x.requires_grad for x in streams):
        return 0
    trained = (any(x is not None and x.requires_grad for x in unit.state.tensors()) for unit in units)
    return next((i for i, trains in enumerate(trained) if trains), len(units))


class _Place(NamedTuple):
    """What a segment is in its call of `backpropagate`.

    Attributes:
        counts: how many of the parameters are each unit's.
        reverse: whether they are reconstructed from their outputs; else the one unit is recomputed from its input.
        width: how many streams the segment takes.
        last: whether its outputs are the caller's.
        lent: the memory of the streams that the caller gave.
    """

    counts: list[int]
    reverse: bool
    width: int
    last: bool
    lent: list[int]


class _Context(Protocol):
    """What a segment keeps between its forward and its backward.

    Attributes:
        units: of the segment.
        place: of the segment.
        replays: what each one's second evaluation has to see.
        parameters: of all of them, in their order.
        anchors: index of a unit -> where its input stands among the saved tensors.
        residues: index of a unit -> where its residue stands among them.
        outputs: where the segment's outputs stand among them.
        hooked: whether somebody's hooks have seen what is saved, and may have kept it.
    """

    units: list[Unit]
    place: _Place
    replays: list[Replay]
    parameters: tuple[Tensor, ...]
    anchors: dict[int, slice]
    residues: dict[int, slice]
    outputs: slice
    hooked: bool
    needs_input_grad: tuple[bool, ...]
    saved_tensors: tuple[Tensor, ...]

    def save_for_backward(self, *tensors: Tensor) -> None: ...

    def set_materialize_grads(self, value: bool) -> None: ...


class _Segment(torch.autograd.Function):
    """One segment. Its tensor inputs are the streams, then what wants gradients of the units, in their order."""

    @staticmethod
    def forward(ctx: _Context, units: list[Unit], held: list[Held], place: _Place, *tensors: Tensor) -> Streams:
        streams, parameters = tensors[: place.width], tensors[place.width :]
        reverse = place.reverse
        device = streams[0].device
        kept: list[Tensor] = []
        ctx.anchors, ctx.residues = {}, {}
        ctx.replays = []
        for i, unit in enumerate(units):
            # An anchor in front of the first unit would be a second copy of what the segment before it stores.
            if not reverse or (i > 0 and unit.anchor):
                ctx.anchors[i] = slice(len(kept), len(kept) + len(streams))
                kept.extend(streams)
            inputs, versions = streams, [version_of(x) for x in streams]
            with Replay.recording(held[i], device) as replay:
                streams, residue = unit.evaluate(*inputs) if reverse else Evaluation(unit(*inputs))
            if residue:
                ctx.residues[i] = slice(len(kept), len(kept) + len(residue))
                kept.extend(residue)
            if [version_of(x) for x in inputs] != versions:
                raise RuntimeError(
                    f"{unit.name} writes into its input, which its recomputation would read: "
                    "let it work on a copy, or call model.set_memory('plain') first"
                )
            ctx.replays.append(replay)
        if reverse:  # all that a run stores: its end, from which it is walked back
            ctx.outputs = slice(len(kept), len(kept) + len(streams))
            kept.extend(streams)
        ctx.units, ctx.place = units, place
        ctx.hooked = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
        # Not through save_for_backward: the primitives need the very objects, not what a hook unpacks.
        ctx.parameters = parameters
        ctx.save_for_backward(*kept)
        ctx.set_materialize_grads(False)
        return streams

    @staticmethod
    def backward(ctx: _Context, *gradients: Tensor | None) -> Gradients:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "reversible backpropagation cannot be differentiated twice: "
                "drop create_graph=True, or call model.set_memory('plain') first"
            )
        if any(d is not None and _is_batched(d) for d in gradients):
            raise RuntimeError(
                "reversible backpropagation takes one gradient at a time: drop is_grads_batched=True or "
                "vectorize=True, or call model.set_memory('plain') first"
            )
        for replay in ctx.replays:
            if (name := replay.held.modified()) is not None:
                raise RuntimeError(
                    f"a parameter or buffer ({name}) was modified in place between forward and "
                    "backward: the recomputation would see other values than the forward did; call backward() before "
                    "optimizer.step()"
                )
        # RevNet's backward: streams hold the outputs of unit i, gradients their gradients, and both move down together.
        place, kept, parameters = ctx.place, ctx.saved_tensors, list(ctx.parameters)
        streams: Streams = kept[ctx.outputs] if place.reverse else ()
        lent = _lent(ctx, kept, gradients)
        parameter_gradients: list[Tensor | None] = []
        shared: dict[int, Tensor] = {}  # of no parameter, but of what units take beside their streams
        for i in reversed(range(len(ctx.units))):
            unit = ctx.units[i]
            count = place.counts[i]
            own = parameters[len(parameters) - count :]
            del parameters[len(parameters) - count :]
            owned = lent.none_of([*streams, *gradients])
            hooked = stand_ins(own)  # their hooks run behind this backward, at what it returns
            wanted = [hooked.get(id(x), x) for x in own if x.requires_grad]  # but for those that were frozen since
            with ctx.replays[i](hooked):
                if place.reverse:
                    residue = kept[ctx.residues[i]] if i in ctx.residues else ()
                    reversal = unit.reverse(streams, gradients, wanted, residue, owned=owned)
                else:
                    inputs = kept[ctx.anchors[i]]
                    needs_input = any(ctx.needs_input_grad[3 : 3 + place.width])
                    reversal = unit.recompute(inputs, gradients, wanted, needs_input, owned=owned)
            streams, gradients = reversal.inputs, reversal.input_gradients
            if i in ctx.anchors:  # exact again: the errors of the units above do not reach those below
                streams = kept[ctx.anchors[i]]
            found = iter(reversal.parameter_gradients)
            of_own = tuple(next(found) if x.requires_grad else None for x in own)
            parameter_gradients[:0] = _summed(own, of_own, shared)
        for i, p in enumerate(ctx.parameters):
            parameter_gradients[i] = shared.pop(id(p), parameter_gradients[i])
        return None, None, None, *lent.returned(gradients), *parameter_gradients


def _summed(tensors: Sequence[Tensor], gradients: Gradients, sums: dict[int, Tensor]) -> Gradients:
    """The parameters' gradients; those of other tensors, which may be as wide as streams, are added up instead."""
    kept = list(gradients)
    for i, (x, d) in enumerate(zip(tensors, gradients, strict=True)):
        if d is not None and not isinstance(x, nn.Parameter):
            sums[id(x)] = sums[id(x)] + d if id(x) in sums else d
            kept[i] = None
    return tuple(kept)


def _lent(ctx: _Context, kept: Streams, gradients: Gradients) -> Lent:
    """What of a segment's memory somebody else will read.

    Between two segments streams and gradients are our own. In front of the first and behind the last they are the
    caller's, and so is all that is saved while the graph stays for another backward pass.
    """
    inner = not ctx.place.last
    outputs = kept[ctx.outputs] if ctx.place.reverse else ()
    free = inner and not ctx.hooked and not torch._C._autograd._get_current_graph_task_keep_graph()
    others = [x for x in kept if not any(x is y for y in outputs)] if free else kept
    return Lent([*others, *(() if inner else gradients)], ctx.place.lent)


def _is_batched(d: Tensor) -> bool:
    """Whether a gradient stands for several, of torch's vmap or of the older one that autograd has of its own."""
    return torch._C._functorch.is_batchedtensor(d) or torch._C._functorch.is_legacy_batchedtensor(d)
