"""How well the runs of a reversible network can be inverted: run forward and back, and compared.

Batch norms are tried with the statistics of a batch (training) and with running ones (fine-tuning with frozen norms).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from petra_zoo.converters.families import family_for, runs_of
from petra_zoo.converters.reestimation import batch_statistics
from petra_zoo.converters.runs import BlockRun, Call, calls_of, relative_error
from petra_zoo.reversible import CoupledUnit, Residue, Streams, untouched

MEASURED_IMAGES = 16  # are enough to find the error of a reconstruction


@dataclass(frozen=True)
class CoupledRun:
    """A run of reversible blocks and how well it can be inverted.

    Attributes:
        layer: where it sits in its network.
        blocks: how many blocks have an inverse where g > 0.
        g: the coupling.
        anchor_every: after how many blocks the streams are kept; 0: never.
        error: largest relative error of a reconstructed input, 0 where nothing is reconstructed.
        bits: how many low bits of each element every unit keeps, for an exact inverse.
    """

    layer: str
    blocks: int
    g: float
    anchor_every: int
    error: float
    bits: int = 0


def measure_runs(model: nn.Module, images: Tensor) -> list[CoupledRun]:
    """The runs of a converted model with their reconstruction error on images [B, C, H, W]."""
    runs = runs_of(model)
    return [describe(run, InversionTrial(run, calls).error()) for run, calls in with_calls(model, runs, images)]


def with_calls(model: nn.Module, runs: Sequence[BlockRun], images: Tensor) -> list[tuple[BlockRun, list[Call]]]:
    """Each run with what it is called with, none of them being changed in between; see `calls_of`."""
    return list(zip(runs, calls_of(model, runs, images, behind=runs), strict=True))


def describe(run: BlockRun, error: float) -> CoupledRun:
    """A run as it stands."""
    return CoupledRun(run.name, run.blocks, run.g(), _kept_every(run), error, run.bits)


def largest_stream(model: nn.Module, runs: Sequence[BlockRun], images: Tensor) -> float:
    """The largest absolute value in the runs' streams, for images [B, C, H, W]; infinite where one is not finite."""
    found = 0.0
    for run, calls in with_calls(model, runs, images):
        states = [streams for call in calls for streams in run_forward(run, call).states]
        found = max([found, *(float(x.abs().max()) for streams in states for x in streams)])
    return found if found == found else float("inf")


def measure_steps(network: nn.Module, images: Tensor) -> dict[str, list[float]]:
    """How much each block of a plain network adds to what it gets, |B(x) - x| / |x|, by run.

    A block that is far from the identity couples badly: above 0 its run drifts from the source's.

    Args:
        network: that some family takes; stays as it is.
        images: [B, C, H, W].
    """
    family = family_for(network, images)
    model = family.couple(network, images[:1])
    steps = {}
    for run, calls in with_calls(model, family.runs(model), images):
        found = []
        for call in calls[:1]:
            units, _ = run.units(call)
            states = run_forward(run, call).states
            for unit, before, behind in zip(units, states, states[1:], strict=False):
                if isinstance(unit, CoupledUnit):
                    found.append(relative_error(behind[0], unit.activate(before[0])))
        steps[run.name] = found
    return steps


class RunForward(NamedTuple):
    """A container run forward: the streams in front of each unit and behind the last, and the units' residues."""

    call: Call
    states: list[Streams]
    residues: list[Residue]


def run_forward(run: BlockRun, call: Call) -> RunForward:
    """A run's units one after the other, with the statistics of the call."""
    units, streams = run.units(call)
    states: list[Streams] = [streams]
    residues: list[Residue] = []
    with batch_statistics(run.container, call.training), untouched(run.container), torch.no_grad():
        for unit in units:
            streams, residue = unit.evaluate(*streams)
            states.append(streams)
            residues.append(residue)
    return RunForward(call, states, residues)


class InversionTrial:
    """A run's container run forward, with each kind of statistics, so that it can be inverted with different anchors.

    Args:
        run: coupled.
        calls: what its container is called with.
    """

    def __init__(self, run: BlockRun, calls: Sequence[Call]) -> None:
        self._run = run
        self._forwards = [run_forward(run, call) for call in calls] if run.g() > 0.0 and run.blocks else []

    def error(self, tolerance: float = float("inf")) -> float:
        """The largest relative error among the inputs that the backward pass hands from unit to unit.

        With the run's anchors as they are. Measuring ends where an error exceeds `tolerance`: that many blocks do not
        pass.
        """
        worst = 0.0
        for call, states, residues in self._forwards:
            units, _ = self._run.units(call)
            found = states[-1]
            with batch_statistics(self._run.container, call.training), torch.no_grad():
                for i in reversed(range(len(units))):
                    unit = units[i]
                    if not unit.reversible:  # recomputed from its input
                        found = states[i]
                        continue
                    found = unit.reverse(found, (None,) * len(found), [], residues[i]).inputs
                    if unit.anchor:
                        found = states[i]
                    pairs = zip(unit.values(found), unit.values(states[i]), strict=True)
                    worst = max([worst, *(relative_error(x, expected) for x, expected in pairs)])
                    if worst > tolerance:
                        return worst
        return worst


def _kept_every(run: BlockRun) -> int:
    """After how many blocks the streams are kept in fact: more often than was asked for where the inverse needs it."""
    spacing = run.container.spacing()
    return spacing if 0 < spacing < run.blocks else 0
