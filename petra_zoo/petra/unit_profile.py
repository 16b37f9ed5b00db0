"""What one unit costs: seconds for each kind of work that a method makes of it, and bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# What a stage does for a micro-batch: keep the graph of its forward; go forward without graph and back by one primitive
# that reconstructs or recomputes; or go forward without graph, once more with it, and backward.
Work = Literal["graph", "reverse", "rerun"]

# The same in forwards of a unit, where nothing was measured: forward 1, recomputation 1, backward 2 (Table 1 of arXiv
# 2406.02052).
FORWARDS: dict[Work, float] = {"graph": 3.0, "reverse": 4.0, "rerun": 4.0}


@dataclass(frozen=True)
class UnitProfile:
    """One unit at the profile's micro-batch size. Times in seconds; the stem's without an input gradient.

    Attributes:
        reversible: whether it has an inverse.
        keeps_input: whether PETRA keeps its input between forward and backward (no inverse, or an anchor).
        forward: forward without a graph.
        reverse: backward from the unit's output (or kept input), recomputation included.
        graph_forward: forward that keeps its graph.
        graph_backward: backward through that graph.
        parameter_bytes: of its parameters.
        input_bytes: of the streams that enter.
        output_bytes: of the streams that leave.
        graph_bytes: what the unit adds to the live bytes of a graph of all units; less than 0 where it frees more of
            what came in than it keeps.
        working_bytes: peak of live bytes inside `reverse`, parameter gradients included.
    """

    name: str
    reversible: bool
    keeps_input: bool
    forward: float
    reverse: float
    graph_forward: float
    graph_backward: float
    parameter_bytes: int
    input_bytes: int
    output_bytes: int
    graph_bytes: int
    working_bytes: int

    @property
    def recomputation(self) -> float:
        """Seconds of `reverse` beyond a backward through a kept graph."""
        return max(0.0, self.reverse - self.graph_backward)

    def seconds(self, work: Work) -> float:
        """Seconds per micro-batch of one kind of work."""
        if work == "graph":
            return self.graph_forward + self.graph_backward
        return self.forward + (self.reverse if work == "reverse" else self.graph_forward + self.graph_backward)

    def forward_seconds(self, work: Work) -> float:
        """Those of them that the micro-batch's own forward takes."""
        return self.graph_forward if work == "graph" else self.forward
