"""What a method is: how a stage trains, what travels, what it costs. One object each, and the registry of them.

Everybody reads a method's facts here: the pipeline, the balance of stages, recipes, the planner. A new one is a `Stage`
of its own and a call of `register_method`; nothing else needs to know.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from petra_zoo.errors import UserError
from petra_zoo.petra.ancestors import BufferedStage, GraphStage
from petra_zoo.petra.footprint import Keeps, keeps_graphs_and_parameters, keeps_irreversible_inputs, keeps_stage_inputs
from petra_zoo.petra.local import LocalStage
from petra_zoo.petra.part import Part, StageSettings
from petra_zoo.petra.stage import Stage
from petra_zoo.petra.unit_profile import Work
from petra_zoo.registry import Registry

MakeStage = Callable[[Part, StageSettings], Stage]


@dataclass(frozen=True)
class Method:
    """A way of training a network in stages.

    Attributes:
        name: what recipes call it.
        summary: one line for people.
        stage: makes a stage; a subclass of `Stage`, or a function.
        work: what a stage does for a micro-batch, for balancing and prediction.
        delayed: whether messages take a tick, so that all stages work at once on different micro-batches. If not, a
            micro-batch goes up and down within one tick: the gradient is exact.
        gradients_travel: whether gradients are sent down.
        streams_travel: whether a stage is sent its output back, reconstructed, to reconstruct its input from.
        last_stage_keeps_graph: whether the last stage, which has no delay, keeps its graph within the tick (its work is
            then `graph`) or works like all others.
        keeps: what a stage keeps between the forward and the backward of a micro-batch; None: the planner, which
            compares pipelines that never drain, leaves the method out.
    """

    name: str
    summary: str
    stage: MakeStage
    work: Work
    delayed: bool = True
    gradients_travel: bool = True
    streams_travel: bool = False
    last_stage_keeps_graph: bool = True
    keeps: Keeps | None = None

    @property
    def last_work(self) -> Work:
        """What the last stage does for a micro-batch."""
        return "graph" if self.last_stage_keeps_graph else self.work

    def delay(self, stages: int, accumulation_steps: int = 1) -> tuple[float, ...]:
        """D_j = 2 (J - 1 - j) / k of every stage j: how many updates old the gradient is that it applies.

        Where the window of k micro-batches is no divisor of 2 (J - 1 - j), a mean: the updates between a forward and
        its backward are the integer below or above it. 0 everywhere without delay, and where no gradient travels.

        Args:
            stages: J.
            accumulation_steps: k.
        """
        ticks = 2 if self.delayed and self.gradients_travel else 0
        return tuple(ticks * (stages - 1 - j) / accumulation_steps for j in range(stages))

    def with_last_stage(self, kind: str) -> Method:
        """The same method with a last stage that keeps its `graph` (cost 3), or does not and must `recompute` (4).

        Raises:
            UserError: neither of the two.
        """
        if kind not in ("graph", "recompute"):
            raise UserError(f"last_stage is 'graph' or 'recompute', not {kind!r}")
        return replace(self, last_stage_keeps_graph=kind == "graph")


METHODS: Registry[Method] = Registry("method", "petra_zoo.methods")


def register_method(method: Method) -> Method:
    """Makes a method known by its name: to pipelines, recipes and the planner.

    Raises:
        UserError: another method has that name.
    """
    METHODS.add(method.name, method)
    return method


def find_method(method: str | Method) -> Method:
    """The method of a name; a method itself is given back.

    Raises:
        UserError: no method has that name; gives the nearest.
    """
    return method if isinstance(method, Method) else METHODS.find(method)


register_method(
    Method(
        "petra",
        "reconstructs every stage's input with the current parameters; keeps neither activations nor older parameters",
        Stage,
        work="reverse",
        streams_travel=True,
        keeps=keeps_irreversible_inputs,
    )
)
register_method(
    Method(
        "dsp",
        "keeps every stage's inputs and runs it once more with the current parameters",
        BufferedStage,
        work="rerun",
        keeps=keeps_stage_inputs,
    )
)
register_method(
    Method(
        "delayed",
        "keeps graphs and the parameters they were built of: the classic delayed gradient",
        partial(GraphStage, stash=True),
        work="graph",
        keeps=keeps_graphs_and_parameters,
    )
)
register_method(
    Method(
        "local",
        "every stage learns from a loss of its own; nothing travels down",
        LocalStage,
        work="graph",
        gradients_travel=False,
    )
)
register_method(
    Method("backprop", "backpropagation, without delay: the exact control", GraphStage, work="graph", delayed=False)
)
register_method(
    Method(
        "reversible",
        "reversible backpropagation, without delay: the exact control that stores no activations",
        Stage,
        work="reverse",
        delayed=False,
        streams_travel=True,
    )
)
