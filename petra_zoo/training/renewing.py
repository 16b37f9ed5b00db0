"""Settings that have changed since a run was saved: its optimizers and schedules go on with those of today.

A state brings the settings along that it was saved with, timm's schedules even their length.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

from petra_zoo.petra import Pipeline
from petra_zoo.petra.optimization import State, renew_settings
from petra_zoo.petra.stage import Stage


class MadeWith:
    """What the optimizers and schedules of a pipeline are made with: to be read before a state is loaded.

    Args:
        pipeline: as it was built.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        self._groups = [_groups_of(stage) for stage in pipeline.stages]
        self._schedules = [
            copy.deepcopy(stage.scheduler.state_dict()) if stage.scheduler else None for stage in pipeline.stages
        ]

    def renew(self, updates: int) -> None:
        """Gives them back what they were made with.

        Args:
            updates: how many of the schedule have passed, as it is now.
        """
        self.pipeline.windows = updates
        for stage, groups, schedule in zip(self.pipeline.stages, self._groups, self._schedules, strict=True):
            if stage.optimizer:
                renew_settings(stage.optimizer, groups)
            if stage.scheduler and schedule is not None:
                stage.scheduler.load_state_dict(schedule)
                if updates:
                    stage.advance_schedule(updates)


def _groups_of(stage: Stage) -> Sequence[State]:
    groups = stage.optimizer.param_groups if stage.optimizer else ()
    return [{key: x for key, x in group.items() if key != "params"} for group in groups]
