"""How the stages of a pipeline update their parameters: what all of them share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import torch
from torch import Tensor, nn

from petra_zoo.errors import UserError

State = dict[str, Any]  # plain values for torch.save, as torch's own state_dict() gives them
NamedParameters = list[tuple[str, nn.Parameter]]
WeightPrediction = Literal["none", "head", "backward"]


# What users set of a parameter group; beside it some optimizers count in there.
_SETTINGS = ("lr", "initial_lr", "lr_scale", "weight_decay", "momentum", "betas", "eps")
_HOW_IT_COMPUTES = ("capturable", "foreach", "fused", "differentiable")


class StepSchedule(Protocol):
    """A learning-rate schedule as torch has it: told of every update."""

    def step(self) -> None: ...

    def state_dict(self) -> State: ...

    def load_state_dict(self, state_dict: State) -> None: ...


@runtime_checkable
class CountSchedule(Protocol):
    """A learning-rate schedule as timm has it: told how many updates there have been."""

    def step_update(self, num_updates: int) -> None: ...

    def state_dict(self) -> State: ...

    def load_state_dict(self, state_dict: State) -> None: ...


LearningRateSchedule = StepSchedule | CountSchedule
MakeOptimizer = Callable[[NamedParameters], torch.optim.Optimizer]
MakeSchedule = Callable[[torch.optim.Optimizer], LearningRateSchedule | None]


@dataclass(frozen=True)
class Optimization:
    """From gradients to updates; each stage has an optimizer and a schedule of its own.

    Attributes:
        optimizer: called with a stage's [(full name in the model, parameter), ...], gives its optimizer; None:
            gradients are found and nothing is updated.
        scheduler: called with a stage's optimizer, gives its schedule (torch's, or timm's with `step_update`). All
            advance in the same tick, once for every k micro-batches fed.
        accumulation_steps: k, gradients averaged per update.
        clip_grad: largest gradient norm, per stage.
        weight_prediction: the weights that a stage's forward uses: ``'none'``, those of the tick; ``'head'``,
            extrapolated to the tick in which the micro-batch reaches the head, so that all stages work with about one
            version of the network; ``'backward'``, to that of its own backward, so that it reconstructs with about the
            weights of the forward. The same where there is no delay, and so in the exact controls.

    Raises:
        UserError: less than one gradient per update, or an unknown kind of prediction.
    """

    optimizer: MakeOptimizer | None = None
    scheduler: MakeSchedule | None = None
    accumulation_steps: int = 1
    clip_grad: float | None = None
    weight_prediction: WeightPrediction = "none"

    def __post_init__(self) -> None:
        if self.accumulation_steps < 1:
            raise UserError(f"accumulation_steps must be at least 1, not {self.accumulation_steps}")
        if self.weight_prediction not in get_args(WeightPrediction):
            raise UserError(f"weight_prediction is 'none', 'head' or 'backward', not {self.weight_prediction!r}")

    def schedule_of(self, optimizer: torch.optim.Optimizer) -> LearningRateSchedule | None:
        """The schedule of an optimizer, where there is any.

        Raises:
            UserError: it does not go by updates, which is all that it would be told of.
        """
        schedule = None if self.scheduler is None else self.scheduler(optimizer)
        if getattr(schedule, "t_in_epochs", False):
            raise UserError(
                f"{type(schedule).__name__} counts epochs, and a pipeline tells it of updates: make it with "
                "t_in_epochs=False, and its lengths in updates"
            )
        if isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau):
            raise UserError(
                "ReduceLROnPlateau goes by a metric, and a pipeline tells a schedule of updates: expected another one "
                "of torch's or timm's; or set the learning rates of pipeline.stages' optimizers in your loop"
            )
        return schedule


def optimizer_state(optimizer: torch.optim.Optimizer) -> State:
    """An optimizer's `state_dict()` without the functions and types among its settings: they are made again."""
    state = optimizer.state_dict()
    plain = [{key: x for key, x in group.items() if not _is_made(x)} for group in state["param_groups"]]
    return {**state, "param_groups": plain}


def _is_made(setting: object) -> bool:
    """Whether it is no plain value: Kron has a function among its settings, AdafactorBigVision a type."""
    return callable(setting) or isinstance(setting, torch.dtype)


def load_optimizer(optimizer: torch.optim.Optimizer, state: State) -> None:
    """Restores what `optimizer_state` gave, types included: torch casts to those of the parameters.

    How a step is computed stays this optimizer's own: the state may have come from another device.

    Raises:
        UserError: its parameters are grouped in another way.
    """
    theirs, mine = ([len(g["params"]) for g in groups] for groups in (state["param_groups"], optimizer.param_groups))
    if theirs != mine:
        raise UserError(
            f"the state is of an optimizer with {_grouped(theirs)}, this one has {_grouped(mine)}: what "
            "freezes parameters or groups them (layer_decay, weight_decay=0) must be as it was"
        )
    own = [
        {key: x for key, x in group.items() if _is_made(x) or key in _HOW_IT_COMPUTES}
        for group in optimizer.param_groups
    ]
    groups = [{**group, **made} for group, made in zip(state["param_groups"], own, strict=False)]
    optimizer.load_state_dict({**state, "param_groups": groups})
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [n for group in state["param_groups"] for n in group["params"]]
    holder = getattr(optimizer, "_base_optimizer", optimizer)  # timm's Lookahead has none of its own
    for p, n in zip(parameters, numbers, strict=True):
        for key, x in state["state"].get(n, {}).items():
            found = holder.state[p][key]
            if isinstance(x, Tensor) and isinstance(found, Tensor) and found.dtype != x.dtype:
                holder.state[p][key] = x.to(found.device, copy=True)


def _grouped(sizes: Sequence[int]) -> str:
    return f"groups of {', '.join(map(str, sizes))} parameters"


def renew_settings(optimizer: torch.optim.Optimizer, made: Sequence[State]) -> None:
    """Gives an optimizer whose state was loaded the settings that it was made with.

    Args:
        optimizer: whose they are.
        made: its parameter groups before it was loaded.
    """
    for group, then in zip(optimizer.param_groups, made, strict=True):
        group.update({key: then[key] for key in _SETTINGS if key in then and key in group})
