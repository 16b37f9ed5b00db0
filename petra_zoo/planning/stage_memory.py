"""Bytes that a device holds while it trains a stage, for each method.

Peaks, counted as `LiveBytes` would count them from the profile's unit bytes; what an allocator or a library's
workspace adds is not in them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import accumulate

from petra_zoo.petra.profile import UnitProfile


@dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
        parameters: of its stage.
        gradients: accumulated, and DDP's buckets.
        optimizer: state.
        graphs: what backward passes need: kept graphs, or the one that is rebuilt.
        inputs: kept for recomputation: PETRA's FIFOs in front of units without an inverse, DSP's stage inputs,
            the units' inputs of activation checkpointing.
        versions: older parameters (weight stashing).
        messages: received and sent streams and gradients.
    """

    parameters: int
    gradients: int
    optimizer: int
    graphs: int
    inputs: int = 0
    versions: int = 0
    messages: int = 0

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return sum(getattr(self, field.name) for field in fields(self))

    def largest(self) -> tuple[str, int]:
        """The part that takes most, by name."""
        return max(((field.name, getattr(self, field.name)) for field in fields(self)), key=lambda part: part[1])


def stage_memory(
    method: str,
    units: Sequence[UnitProfile],
    stage: int,
    stages: int,
    micro_batches: int,
    *,
    optimizer_states: int = 1,
    replicas: int = 1,
    scale: float = 1.0,
) -> Memory:
    """Peak bytes of a stage.

    Args:
        method: one of `petra_zoo.planning.performance.METHODS`.
        units: the stage's units.
        stage: its index, from 0.
        stages: number of stages, p or J.
        micro_batches: per update: m of a synchronous schedule, k of an asynchronous one.
        optimizer_states: numbers of state per parameter (SGD with momentum 1, AdamW 2).
        replicas: D, of the whole pipeline.
        scale: size of the micro-batch over the profile's.
    """
    first, last = stage == 0, stage == stages - 1
    parameters = sum(unit.parameter_bytes for unit in units)
    received, sent = (0 if first else units[0].input_bytes), (0 if last else units[-1].output_bytes)
    graph, rerun, working = _graph(units), _rerun(units), max(unit.working_bytes for unit in units)
    gradients, inputs, versions = parameters, 0, 0
    if method in ("petra", "dsp", "delayed"):
        if micro_batches > 1:
            gradients *= 2  # the window's sum, and a micro-batch's own
        delay = 2 * (stages - 1 - stage)
        # Links receive into two sets of buffers in turn; what is sent lives until it has been taken.
        messages = 2 * (received + sent) + sent
        if last:
            graphs = rerun
        elif method == "petra":
            graphs = working
            inputs = (delay + 1) * sum(unit.input_bytes for unit in units if unit.keeps_input)
            # Streams come down beside the gradients; both walk through the stage in tensors of its own.
            messages += 2 * units[-1].reversible * sent + 2 * max(unit.output_bytes for unit in units)
        elif method == "dsp":
            graphs = rerun
            inputs = (delay + 1) * units[0].input_bytes
        else:
            graphs = delay * graph + rerun
            inputs = (delay + 1) * units[0].input_bytes
            versions = (-(-delay // micro_batches) + 1) * parameters
    elif method == "ddp":
        graphs, messages = rerun, 0
        if replicas > 1:
            gradients *= 2  # DistributedDataParallel's buckets
    else:
        kept = micro_batches if method == "gpipe" else min(micro_batches, stages - stage)
        # The losses that torch's schedules keep hold on to what the last stage received, of every micro-batch.
        messages = (micro_batches if last else kept) * received + sent
        if method == "1f1b+checkpoint":
            made = list(accumulate(_made(unit) for unit in units))
            inputs = (kept - 1) * made[-1]
            graphs = max(before + unit.working_bytes for before, unit in zip(made, units, strict=True))
        else:
            graphs = (kept - 1) * graph + rerun
    return Memory(
        parameters=parameters,
        gradients=gradients,
        optimizer=optimizer_states * parameters,
        graphs=round(graphs * scale),
        inputs=round(inputs * scale),
        versions=versions,
        messages=round(messages * scale),
    )


def _graph(units: Sequence[UnitProfile]) -> int:
    return sum(unit.graph_bytes for unit in units)


def _rerun(units: Sequence[UnitProfile]) -> int:
    """Peak while the stage's whole graph is built and freed again, unit by unit from the last."""
    built = accumulate(unit.graph_bytes for unit in units)
    return max(graph + max(0, unit.working_bytes - unit.graph_bytes) for graph, unit in zip(built, units, strict=True))


def _made(unit: UnitProfile) -> int:
    """Bytes of a unit's outputs that are not its input: a coupled block passes one of its two streams on."""
    return unit.output_bytes // 2 if unit.reversible else unit.output_bytes
