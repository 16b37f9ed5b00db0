"""From a network and its layout to the stages of a rank."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial

from petra_zoo.errors import UserError
from petra_zoo.petra.clock import Clock
from petra_zoo.petra.counting import output_shapes, required_input_size
from petra_zoo.petra.fifo import Ring, queue
from petra_zoo.petra.layout import Layout
from petra_zoo.petra.methods import Method
from petra_zoo.petra.part import Part, Shapes, StageSettings
from petra_zoo.petra.stage import Stage
from petra_zoo.petra.weight_prediction import make_prediction
from petra_zoo.reversible import Unit, UnitModel


def make_stages(
    model: UnitModel,
    units: Sequence[Unit],
    layout: Layout,
    rank: int,
    method: Method,
    settings: StageSettings,
    clock: Clock,
) -> list[Stage]:
    """The stages of a rank, with their optimizers."""
    names = {id(p): name for name, p in model.named_parameters()}

    @cache
    def shapes() -> Shapes:
        return output_shapes(model, required_input_size(model, layout.input_size))

    stages, ticks = [], method.delay(len(layout.stages))
    for j in layout.ranks[rank]:
        owned = layout.stages[j]
        part = Part(
            units=[units[i] for i in owned],
            index=j,
            first_unit=owned.start,
            last=j == len(layout.stages) - 1,
            # Only a stage whose last unit has an inverse has a use for its output.
            sends_streams=method.streams_travel and j > 0 and units[owned.start - 1].reversible,
            shapes=shapes,
            fifo=partial(Ring, int(ticks[j]) + 1) if settings.static and ticks[j] else queue,
        )
        if ticks[j]:
            _expect_other_parameters(part.units, method)
        stage = method.stage(part, settings)
        stage.start_optimizer(names)
        stage.prediction = make_prediction(stage.optimizer, settings.optimization, clock, j, int(ticks[j]))
        stages.append(stage)
    return stages


def _expect_other_parameters(units: Sequence[Unit], method: Method) -> None:
    """Tells units that their parameters change between their forward and their backward.

    Raises:
        UserError: one has no inverse then.
    """
    for unit in units:
        if method.streams_travel and unit.needs_same_parameters:
            raise UserError(
                f"{unit.name} keeps the bits that its coupling below 1 drops, which give its input back as long as no "
                f"parameter changes, and under {method.name} they do: use coupling 1, or anchors (anchor_every) and "
                "exact=False"
            )
        unit.same_parameters = False


def first_trainable(units: Sequence[Unit]) -> int:
    """Index of the first unit with a parameter to train; the last one's where there is none."""
    return next((i for i, unit in enumerate(units) if any(p.requires_grad for p in unit.parameters())), len(units) - 1)


def require_all_parameters(model: UnitModel, units: Sequence[Unit]) -> None:
    """Refuses a parameter that no stage would train or update.

    Raises:
        UserError: names it.
    """
    owned = {id(p) for unit in units for p in unit.parameters()}
    for name, p in model.named_parameters():
        if p.requires_grad and id(p) not in owned:
            raise UserError(f"{name} belongs to no unit, so no stage would train it: model.units() must contain it")


def require_one_stage_each(model: UnitModel, units: Sequence[Unit], layout: Layout) -> None:
    """Refuses a parameter that two stages would train, each at a time of its own and with its own optimizer.

    Raises:
        UserError: names it.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    home: dict[int, int] = {}
    for j, owned in enumerate(layout.stages):
        for p in (p for i in owned for p in units[i].parameters() if p.requires_grad):
            if home.setdefault(id(p), j) != j:
                raise UserError(
                    f"{names.get(id(p), 'a parameter')} belongs to units of stages {home[id(p)]} and {j}, which would "
                    "both update it: use stages=1, or freeze it"
                )
