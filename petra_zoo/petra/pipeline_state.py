"""A pipeline in one process as plain values, messages in flight included, and back."""

from __future__ import annotations

from typing import NotRequired, Protocol, TypedDict

from torch import Tensor

from petra_zoo.errors import UserError
from petra_zoo.petra.clock import Clock
from petra_zoo.petra.layout import Layout
from petra_zoo.petra.links import Links
from petra_zoo.petra.messages import Down, Up
from petra_zoo.petra.methods import Method
from petra_zoo.petra.stage import Stage, StageState, copies
from petra_zoo.petra.stream_watch import StreamWatch
from petra_zoo.reversible import Gradients, Streams, UnitModel


class Running(Protocol):
    """What of a pipeline is its state, or says what it may be."""

    model: UnitModel
    method: Method
    layout: Layout
    stages: list[Stage]
    clock: Clock
    links: Links
    streams: StreamWatch
    fed: int


class PipelineState(TypedDict):
    """A pipeline as plain values; messages are by receiving stage, oldest first."""

    method: str
    partition: list[int]
    tick: int
    feeds: dict[int, bool]
    fed: int
    model: dict[str, Tensor]
    ups: dict[int, list[tuple[int, Streams, Tensor]]]
    downs: dict[int, list[tuple[int, Streams, Gradients]]]
    stages: list[StageState]
    streams: NotRequired[list[str]]  # what carries them, in words


def state_of(pipeline: Running) -> PipelineState:
    """See `Pipeline.state_dict`."""
    clock, links = pipeline.clock, pipeline.links
    return {
        "method": pipeline.method.name,
        "partition": pipeline.layout.sizes,
        "tick": clock.tick,
        "feeds": dict(clock.fed),
        "fed": pipeline.fed,
        "model": pipeline.model.state_dict(),
        "ups": {j: [(m.micro_batch, m.streams, m.labels) for m in queue] for j, queue in links.ups.items()},
        "downs": {j: [(m.micro_batch, m.streams, m.gradients) for m in queue] for j, queue in links.downs.items()},
        "stages": [stage.state_dict() for stage in pipeline.stages],
        "streams": pipeline.streams.kinds(),
    }


def restore(pipeline: Running, state: PipelineState) -> None:
    """See `Pipeline.load_state_dict`."""
    for key, its, mine in (
        ("method", state["method"], pipeline.method.name),
        ("partition", state["partition"], pipeline.layout.sizes),
    ):
        if its != mine:
            raise UserError(f"the state is of a pipeline with {key}={its}, this one has {key}={mine}")
    clock = pipeline.clock
    clock.tick, clock.fed, pipeline.fed = state["tick"], dict(state["feeds"]), state["fed"]
    pipeline.model.load_state_dict(state["model"])  # before the stages: graphs in flight are built of its modules
    kinds = pipeline.streams.kinds()
    for then, now in zip(state.get("streams", kinds), kinds, strict=True):
        if then != now:
            raise UserError(f"the state has {then}, this pipeline's model {now}: call set_streams() as it was, first")
    pipeline.streams.look(in_flight=0)
    pipeline.links = Links(pipeline.links.wire)
    for j, ups in state["ups"].items():
        pipeline.links.ups[j].extend(Up(n, copies(x), y.clone()) for n, x, y in ups)
    for j, downs in state["downs"].items():
        pipeline.links.downs[j].extend(Down(n, copies(x), _copies(d)) for n, x, d in downs)
    for stage, stage_state in zip(pipeline.stages, state["stages"], strict=True):
        stage.load_state_dict(stage_state)
        stage.ranges.forget()


def _copies(gradients: Gradients) -> Gradients:
    return tuple(None if x is None else x.clone() for x in gradients)
