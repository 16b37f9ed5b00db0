"""Ending before all is trained: when nothing gets better any more, and when the loss runs away.

Both go by numbers that are read anyway: a validation's, and those of the log. Only the process that reports has them;
`petra_zoo.training.run` sees to it that all processes end behind the same tick.
"""

from __future__ import annotations

import math
from collections import deque

from petra_zoo.checkpoints.store import LOWER_IS_BETTER
from petra_zoo.evaluation.scores import Scores
from petra_zoo.petra.optimization import State
from petra_zoo.settings.recipe import Recipe
from petra_zoo.settings.types import Metric
from petra_zoo.training.losses import guessing_loss
from petra_zoo.wording import counted


def is_better(scores: Scores, than: float, metric: Metric) -> bool:
    """Whether a validation is better by a metric."""
    now = float(getattr(scores, metric))
    return now < than if metric in LOWER_IS_BETTER else now > than


class Patience:
    """Counts validations since the best one.

    Args:
        recipe: its `patience` and its `checkpoint_metric`, top1 where that is null, as for `keep_best`.

    Attributes:
        best: the best validation so far.
        waited: validations since.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.limit = recipe.patience
        self.metric: Metric = recipe.checkpoint_metric or "top1"
        self.best: float | None = None
        self.waited = 0

    def saw(self, scores: Scores) -> None:
        """A validation."""
        if self.best is None or is_better(scores, self.best, self.metric):
            self.best, self.waited = float(getattr(scores, self.metric)), 0
        else:
            self.waited += 1

    @property
    def over(self) -> str | None:
        """Why the run ends here; None where it does not."""
        if self.limit is None or self.waited < self.limit or self.best is None:
            return None
        times = counted(self.waited, "validation")
        return f"patience={self.limit}: {times} without a better {self.metric} than {self.best:.5g}"

    def state(self) -> State:
        """What a continuation needs to end where this run would have ended."""
        return {"best": self.best, "waited": self.waited, "metric": self.metric, "limit": self.limit}

    def load(self, state: State) -> None:
        """Restores what `state` gave, where it counted by the same metric, and counted at all."""
        if state.get("metric", self.metric) == self.metric and state.get("limit", self.limit) is not None:
            self.best, self.waited = state["best"], state["waited"]


class Divergence:
    """Tells a loss that runs away, from the means that the log reads.

    It has where several readings in a row are above twice both the loss before the first update and that of guessing,
    and are not falling: what a warm-up or a first step kicks up comes down again. What guessing costs is not known of a
    loss of one's own, or of distillation. Then it takes ten times the loss before the first update, which may be small
    in fine-tuning.

    Args:
        recipe: what is trained.
        num_classes: of the logits.

    Attributes:
        start: the loss before the first update.
        found: what is wrong, in words.
    """

    READINGS = 3
    ABOVE, ABOVE_START = 2.0, 10.0

    def __init__(self, recipe: Recipe, num_classes: int) -> None:
        self.watches = recipe.on_divergence == "stop"
        self.guessing = None if recipe.kd_model_name else guessing_loss(recipe.loss, num_classes)
        self.start: float | None = None
        self.found: str | None = None
        self._recent: deque[float] = deque(maxlen=self.READINGS)

    @property
    def limit(self) -> float:
        """Loss above which training has diverged; infinite where that is not known."""
        if self.start is None:
            return math.inf
        if self.guessing is not None:
            return self.ABOVE * max(self.start, self.guessing)
        return self.ABOVE_START * self.start if self.start > 0 else math.inf

    def saw(self, loss: float) -> None:
        """A reading of the log."""
        self._recent.append(loss)
        readings = list(self._recent)
        full, falling = len(readings) == self.READINGS, readings[-1] == min(readings)
        if self.watches and full and not falling and min(readings) > self.limit:
            said = ", ".join(f"{x:.4g}" for x in readings)
            guess = "" if self.guessing is None else f", guessing gives {self.guessing:.4g}"
            self.found = f"the loss runs away: it began with {self.start:.4g}{guess}, and the log's last are {said}"

    def state(self) -> State:
        """What a continuation needs to see what this run would have seen."""
        return {"start": self.start, "recent": list(self._recent)}

    def load(self, state: State) -> None:
        """Restores what `state` gave."""
        self.start = state["start"]
        self._recent = deque(state["recent"], maxlen=self.READINGS)


def what_to_lower(recipe: Recipe) -> str:
    """What to do about a loss that runs away, as settings."""
    clip = "set clip_grad" if recipe.clip_grad is None else f"lower clip_grad (it is {recipe.clip_grad:g})"
    late = f", lower the delay (D_0 = {recipe.delay[0]:.3g}: larger accumulation_steps)" if recipe.delay[0] else ""
    return (
        f"lower lr (it is {recipe.learning_rate:g}; petra-zoo lr suggests one), raise warmup_epochs, {clip}{late}; "
        "on_divergence=ignore trains on"
    )
