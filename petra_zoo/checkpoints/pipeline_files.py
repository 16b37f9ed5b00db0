"""The state of a pipeline as files, by stage and not by process: which process has a stage is no part of them.

    pipeline.safetensors    clock and counters, and the tensors that belong to no unit
    stage-000.safetensors   a stage's parameters, buffers, moving average, optimizer, schedule, window, FIFOs
    sent-000.safetensors    the messages that a stage has sent in the last tick, where there are any

Replicas of the pipeline put `replica-1-` and so on in front.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from petra_zoo.checkpoints.manifest import verify_file
from petra_zoo.checkpoints.packing import CheckpointError, from_safetensors
from petra_zoo.checkpoints.store import RunCheckpoint
from petra_zoo.petra.optimization import State
from petra_zoo.petra.pipeline_state import PipelineState

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Averages:
    """A moving average of a model: by stage, and what belongs to no unit; tensors by name."""

    shared: Tensors
    stages: Mapping[int, Tensors]


def to_files(
    state: PipelineState, average: Averages | None = None, replica: int = 0, *, with_clock: bool = True
) -> dict[str, State]:
    """What a process saves of its own stages, by name of the file.

    Args:
        state: of the pipeline.
        average: of the model, where one is kept.
        replica: of the pipeline.
        with_clock: whether this process is the one of its replica that saves what all of them know.
    """
    files: dict[str, State] = {}
    if with_clock:
        files[_name(replica, "pipeline")] = {
            **{key: state[key] for key in ("method", "partition", "tick", "feeds", "fed", "windows", "shared")},
            "average": None if average is None else average.shared,
        }
    for j, weights in state["weights"].items():
        files[_name(replica, f"stage-{j:03}")] = {
            "weights": weights,
            "average": None if average is None else average.stages[j],
            "training": state["stages"][j],
            "streams": state["streams"][j],
        }
        if any(state["sent"][j].values()):
            files[_name(replica, f"sent-{j:03}")] = {**state["sent"][j]}
    return files


def from_files(
    checkpoint: RunCheckpoint, replica: int, own: Iterable[int], senders: Iterable[int]
) -> tuple[PipelineState, Averages | None]:
    """What a process takes back; every file is verified before it is read.

    Args:
        checkpoint: where the files are.
        replica: of the pipeline.
        own: the stages of this process.
        senders: those whose messages it may have to receive or to save again.

    Raises:
        CheckpointError: a file is missing or damaged, or is none of these.
    """

    def read(what: str) -> State:
        return from_safetensors(verify_file(checkpoint.path, checkpoint.manifest, _name(replica, what)))

    try:
        common = read("pipeline")
        stages = {j: read(f"stage-{j:03}") for j in own}
        sent = [j for j in senders if _name(replica, f"sent-{j:03}") in checkpoint.manifest.files]
        state: PipelineState = {
            "method": common["method"],
            "partition": common["partition"],
            "tick": common["tick"],
            "feeds": common["feeds"],
            "fed": common["fed"],
            "windows": common.get("windows"),
            "shared": common["shared"],
            "weights": {j: stage["weights"] for j, stage in stages.items()},
            "stages": {j: stage["training"] for j, stage in stages.items()},
            "streams": {j: stage["streams"] for j, stage in stages.items()},
            "sent": {j: {"ups": part["ups"], "downs": part["downs"]} for j in sent for part in [read(f"sent-{j:03}")]},
        }
        if common["average"] is None:
            return state, None
        return state, Averages(common["average"], {j: stage["average"] for j, stage in stages.items()})
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{checkpoint.path} is no checkpoint of a pipeline: {error}") from error


def _name(replica: int, what: str) -> str:
    return f"replica-{replica}-{what}.safetensors" if replica else f"{what}.safetensors"
