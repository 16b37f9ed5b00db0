"""Weight prediction: forwards with the weights that a stage will have when their micro-batch is looked at again.

Between a micro-batch's forward in stage j and the tick in which the head sees it lie J - 1 - j ticks, and twice as many
to its backward in stage j. What is predicted is where the optimizer will be by then: see `coasting`. The backward uses
the weights of its own tick as ever, so there is one version of them and no stash.

Sources: SpecTrain (arXiv 1809.02839), PipeMare (1910.05124), linear weight prediction (2003.11666).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.optim import Optimizer

from petra_zoo.petra.clock import Clock
from petra_zoo.petra.coasting import Coasting, coasting_of
from petra_zoo.petra.optimization import Optimization


class Prediction:
    """The weights that one stage will have, and forwards that run with them.

    Costs a transient copy of the stage's parameters in every forward (Adam and its like: two), and what its
    optimizer's `Coasting` keeps.

    Args:
        coasting: where the stage's optimizer will be.
        clock: of the pipeline.
        stage: the stage's index.
        ticks: how far ahead.
        accumulation_steps: gradients per update.
    """

    def __init__(self, coasting: Coasting, clock: Clock, stage: int, ticks: int, accumulation_steps: int) -> None:
        self.coasting = coasting
        self.clock, self.stage, self.ticks, self.accumulation_steps = clock, stage, ticks, accumulation_steps

    def updates(self, gradients_in_window: int) -> int:
        """How many updates the stage will make before the tick that lies `ticks` ahead: exact, also while filling.

        In a tick the forward comes first: the backwards of this tick and of the `ticks` - 1 next fill the window.
        """
        return (gradients_in_window + self.clock.backwards_within(self.stage, self.ticks)) // self.accumulation_steps

    @contextmanager
    def ahead(self, gradients_in_window: int) -> Iterator[None]:
        """Inside, the stage's parameters are the predicted ones; outside, again their own, to the bit."""
        updates = self.updates(gradients_in_window)
        with torch.no_grad():
            predicted = self.coasting.ahead(updates) if updates else []
        # Storage is exchanged, not values: exact, free, and no version counter of a graph in flight moves.
        predicted = [(p, x) for p, x in predicted if p.requires_grad]  # one that was frozen since goes nowhere
        own = [(p, p.data) for p, _ in predicted]
        try:
            for p, x in predicted:
                p.data = x
            torch.clear_autocast_cache()  # a caller's own autocast would go on with the weights that it cast before
            yield
        finally:
            for p, x in own:
                p.data = x
            torch.clear_autocast_cache()


def make_prediction(
    optimizer: Optimizer | None, optimization: Optimization, clock: Clock, stage: int, delay: int
) -> Prediction | None:
    """The prediction of a stage; None where there is nothing to predict.

    Without delay the weights of that tick are those of this one: the last stage, and the exact controls by the same
    settings, run as they are.

    Args:
        optimizer: the stage's, where it has one.
        optimization: of the pipeline.
        clock: of the pipeline.
        stage: the stage's index.
        delay: ticks between the forward and the backward of a micro-batch in the stage.

    Raises:
        UserError: the optimizer has no momentum to predict by.
    """
    ticks = {"none": 0, "head": delay // 2, "backward": delay}[optimization.weight_prediction]
    if optimizer is None or ticks == 0:
        return None
    return Prediction(coasting_of(optimizer), clock, stage, ticks, optimization.accumulation_steps)
