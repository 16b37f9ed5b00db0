"""A pipeline in one process as plain values, messages in flight included, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from petra_zoo.petra.links import Links
from petra_zoo.petra.messages import Down, Up

if TYPE_CHECKING:
    from petra_zoo.petra.pipeline import Pipeline


def state_of(pipeline: Pipeline) -> dict[str, Any]:
    """See `Pipeline.state_dict`."""
    clock, links = pipeline.clock, pipeline.links
    return {
        "method": pipeline.method,
        "partition": [len(owned) for owned in pipeline.partition],
        "tick": clock.tick,
        "feeds": dict(clock.fed),
        "fed": pipeline.fed,
        "model": pipeline.model.state_dict(),
        "ups": {j: [(m.micro_batch, m.streams, m.labels) for m in queue] for j, queue in links.ups.items()},
        "downs": {j: [(m.micro_batch, m.streams, m.gradients) for m in queue] for j, queue in links.downs.items()},
        "stages": [stage.state_dict() for stage in pipeline.stages],
    }


def restore(pipeline: Pipeline, state: dict[str, Any]) -> None:
    """See `Pipeline.load_state_dict`."""
    for key, mine in (("method", pipeline.method), ("partition", [len(owned) for owned in pipeline.partition])):
        if state[key] != mine:
            raise ValueError(f"the state is of a pipeline with {key}={state[key]}, this one has {key}={mine}")
    clock = pipeline.clock
    clock.tick, clock.fed, pipeline.fed = state["tick"], dict(state["feeds"]), state["fed"]
    pipeline.model.load_state_dict(state["model"])
    pipeline.links = Links(pipeline.wire)
    for j, queue in state["ups"].items():
        pipeline.links.ups[j].extend(Up(n, _copies(x), y.clone()) for n, x, y in queue)
    for j, queue in state["downs"].items():
        pipeline.links.downs[j].extend(Down(n, _copies(x), _copies(d)) for n, x, d in queue)
    for stage, stage_state in zip(pipeline.stages, state["stages"], strict=True):
        stage.load_state_dict(stage_state)


def _copies(tensors: Any) -> Any:
    return tuple(None if x is None else x.clone() for x in tensors)
