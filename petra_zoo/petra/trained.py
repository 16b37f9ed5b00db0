"""What a pipeline trains: the parameters that asked for gradients when it was built, for as long as they do."""

from __future__ import annotations

from collections.abc import Sequence

from petra_zoo.errors import UserError
from petra_zoo.petra.stage import Stage


class TrainedWatch:
    """Looks, before each tick, whether a parameter wants to be trained that no optimizer has.

    Args:
        stages: those of this process.
    """

    def __init__(self, stages: Sequence[Stage]) -> None:
        self._units = [unit for stage in stages for unit in stage.units]
        self._known = {id(p) for stage in stages for p in stage.own_parameters()}

    def look(self) -> None:
        """Freezing one of its parameters a pipeline lives with.

        Raises:
            UserError: a parameter was unfrozen, or another one put in the place of one.
        """
        for unit in self._units:
            state = unit.state
            for i in state.parameters:
                tensors, name = state.slots[i]
                x = tensors.get(name)
                if x is not None and x.requires_grad and id(x) not in self._known:
                    raise UserError(
                        f"{state.name(i)} of {unit.name} was frozen, or another tensor, when the pipeline was built, "
                        "and would not be trained: build the pipeline anew, or freeze it (requires_grad_(False))"
                    )
