"""A pipeline as plain values, by stage, messages in flight included, and back.

A process gives what its own stages have, and takes back what those have that it owns by then: which process has a stage
is no part of the state. A message belongs to the stage that has sent it, which is all that is known of it between two
ticks; it comes back in the queue of the stage that will receive it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Protocol, TypedDict

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from petra_zoo.errors import UserError
from petra_zoo.petra.clock import Clock
from petra_zoo.petra.layout import Layout
from petra_zoo.petra.links import Links
from petra_zoo.petra.messages import Down, Up
from petra_zoo.petra.methods import Method
from petra_zoo.petra.optimization import Optimization
from petra_zoo.petra.stage import Stage
from petra_zoo.petra.stage_state import StageState, copies
from petra_zoo.petra.stream_watch import StreamWatch
from petra_zoo.petra.world import World
from petra_zoo.reversible import Gradients, Streams, UnitModel, units_of
from petra_zoo.reversible.operands import Operand


class Running(Protocol):
    """What of a pipeline is its state, or says what it may be."""

    model: UnitModel
    method: Method
    layout: Layout
    world: World
    stages: list[Stage]
    optimization: Optimization
    clock: Clock
    links: Links
    streams: StreamWatch
    fed: int
    windows: int


class Sent(TypedDict):
    """What a stage has sent in the last tick: (micro-batch, streams, labels) up and (..., gradients) down."""

    ups: list[tuple[int, Streams, Tensor]]
    downs: list[tuple[int, Streams, Gradients]]


class PipelineState(TypedDict):
    """A pipeline as plain values; by stage of this process what is one's own, and alike in all processes the rest.

    `weights` are parameters and buffers by name, `shared` those that belong to no unit.
    """

    method: str
    partition: list[int]
    tick: int
    feeds: dict[int, bool]
    fed: int
    windows: int | None  # not in states of earlier versions
    shared: dict[str, Tensor]
    weights: dict[int, dict[str, Tensor]]
    stages: dict[int, StageState]
    sent: dict[int, Sent]
    streams: dict[int, list[str]]  # what carries them, in words


def state_of(pipeline: Running) -> PipelineState:
    """See `Pipeline.state_dict`."""
    clock, own = pipeline.clock, pipeline.stages
    return {
        "method": pipeline.method.name,
        "partition": pipeline.layout.sizes,
        "tick": clock.tick,
        "feeds": dict(clock.fed),
        "fed": pipeline.fed,
        "windows": pipeline.windows,
        "shared": shared_tensors(pipeline.model),
        "weights": {stage.index: stage_tensors(pipeline.model, pipeline.layout, stage.index) for stage in own},
        "stages": {stage.index: stage.state_dict() for stage in own},
        "sent": {stage.index: _sent_by(stage.index, pipeline.links) if clock.delayed else _NOTHING for stage in own},
        "streams": {stage.index: StreamWatch(stage.units).kinds() for stage in own},
    }


def restore(pipeline: Running, state: PipelineState) -> None:
    """See `Pipeline.load_state_dict`."""
    for key, its, mine in (
        ("method", state["method"], pipeline.method.name),
        ("partition", state["partition"], pipeline.layout.sizes),
    ):
        if its != mine:
            raise UserError(f"the state is of a pipeline with {key}={its}, this one has {key}={mine}")
    clock, layout, links = pipeline.clock, pipeline.layout, pipeline.links
    state = _on_device(state, pipeline.world.device)
    clock.tick, clock.fed, pipeline.fed = state["tick"], dict(state["feeds"]), state["fed"]
    windows, steps = state.get("windows"), pipeline.optimization.accumulation_steps
    pipeline.windows = pipeline.fed // steps if windows is None else windows
    load_tensors(shared_tensors(pipeline.model), state["shared"])
    for stage in pipeline.stages:  # before what they keep: graphs in flight are built of these modules
        load_tensors(stage_tensors(pipeline.model, layout, stage.index), state["weights"][stage.index])
    for stage in pipeline.stages:
        for then, now in zip(state["streams"][stage.index], StreamWatch(stage.units).kinds(), strict=True):
            if then != now:
                raise UserError(
                    f"the state has {then}, this pipeline's model {now}: call set_streams() as it was, first"
                )
        trained, theirs = len(stage.own_parameters()), len(state["stages"][stage.index]["gradients"])
        if trained != theirs:
            raise UserError(
                f"the state is of a stage {stage.index} that trains {theirs} tensors, this one trains {trained}: "
                "what is frozen must be as it was"
            )
    pipeline.streams.look(in_flight=0)
    links.forget()
    for j, sent in sorted(state["sent"].items()):
        for n, x, y in sent["ups"]:
            links.resend_up(j + 1, Up(n, copies(x), y.clone()))
        for n, x, d in sent["downs"]:
            links.resend_down(j - 1, Down(n, copies(x), _copies(d)))
    for stage in pipeline.stages:
        stage.load_state_dict(state["stages"][stage.index])
        stage.ranges.forget()


def _on_device(state: PipelineState, device: torch.device) -> PipelineState:
    """What a state has in flight, on the device that goes on with it: a file gives all of it on the CPU.

    Weights and what an optimizer keeps are copied into what is there already.
    """

    in_flight = {j: {**own, "optimizer": None} for j, own in state["stages"].items()}
    stages, sent = tree_map_only(Tensor, lambda x: x.to(device), (in_flight, state["sent"]))
    for j, own in state["stages"].items():
        stages[j]["optimizer"] = own["optimizer"]
    return {**state, "stages": stages, "sent": sent}


def not_finite_in(state: PipelineState, *, in_flight: bool) -> str | None:
    """What of a state is infinite or not a number, in words; None where nothing is.

    Args:
        state: of a pipeline.
        in_flight: whether what is on its way counts too: windows, FIFOs and messages.
    """
    for j, weights in state["weights"].items():
        for name, x in weights.items():
            if not _finite(x):
                return name
        kept = (state["stages"][j]["gradients"], state["stages"][j]["in_flight"], state["sent"][j])
        if in_flight and not all(map(_finite, _tensors_in(kept))):
            return f"what stage {j} keeps of micro-batches in flight"
    return None


def stages_to_read(layout: Layout, rank: int) -> tuple[range, list[int]]:
    """The stages whose state a rank takes back, and those whose messages it does: its own and their neighbours'."""
    own = layout.ranks[rank]
    return own, [j for j in range(own.start - 1, own.stop + 1) if 0 <= j < len(layout.stages)]


def stage_tensors(model: UnitModel, layout: Layout, stage: int) -> dict[str, Tensor]:
    """Parameters and buffers of a stage's units, by their names in the model; the live ones."""
    units = units_of(model)
    own = {id(x) for i in layout.stages[stage] for x in _tensors(units[i])}
    return {name: x.detach() for name, x in _named(model) if id(x) in own}


def shared_tensors(model: UnitModel) -> dict[str, Tensor]:
    """Those that belong to no unit, such as couplings: every process has them."""
    owned = {id(x) for unit in units_of(model) for x in _tensors(unit)}
    return {name: x.detach() for name, x in _named(model) if id(x) not in owned}


@torch.no_grad()
def load_tensors(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Gives tensors the values of others of the same names and shapes, where they lie.

    Raises:
        UserError: they are those of another model; names one.
    """
    for name in own.keys() ^ state.keys():
        raise UserError(f"the state is another model's: {name} is in one of them only")
    for name, x in own.items():
        if x.shape != state[name].shape:
            raise UserError(f"the state is another model's: {name} is {list(state[name].shape)}, not {list(x.shape)}")
        x.copy_(state[name])


def _finite(x: Tensor) -> bool:
    return not x.is_floating_point() or bool(x.isfinite().all())


def _tensors_in(kept: Iterable[Operand]) -> Iterator[Tensor]:
    """Those in 16 bits aside: they may be bits of fixed-point numbers."""
    for x in kept:
        if isinstance(x, Tensor) and x.element_size() > 2:
            yield x
        elif isinstance(x, Mapping):
            yield from _tensors_in(x.values())
        elif isinstance(x, list | tuple):
            yield from _tensors_in(x)


def _named(model: UnitModel) -> Iterator[tuple[str, Tensor]]:
    yield from chain(model.named_parameters(), model.named_buffers())


def _tensors(unit: nn.Module) -> Iterator[Tensor]:
    yield from chain(unit.parameters(), unit.buffers())


# Without delay messages arrive in the tick in which they are sent, whatever a sender still knows of them.
_NOTHING: Sent = {"ups": [], "downs": []}


def _sent_by(stage: int, links: Links) -> Sent:
    ups, downs = links.sent_by(stage)
    return {
        "ups": [(m.micro_batch, m.streams, m.labels) for m in ups],
        "downs": [(m.micro_batch, m.streams, m.gradients) for m in downs],
    }


def _copies(gradients: Gradients) -> Gradients:
    return tuple(None if x is None else x.clone() for x in gradients)
