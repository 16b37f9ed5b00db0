"""What the delay of the first stage means for accuracy, and how people are told."""

from __future__ import annotations

from petra_zoo.settings.recipe import Recipe
from petra_zoo.settings.update import bearable_size

# Above which D_0 (delay of the first stage, in updates) people are warned, by timm's name of the optimizer.
# Provisional: the study that is to find where a loss begins (docs/evidence.md) is under way, and has seen one at 6.5.
BORDERS = {"muon": 6.0}
BORDER_OF_OTHERS = 6.0


def border(opt: str) -> float:
    """The largest D_0, in updates, at which training with an optimizer of timm's brings no warning."""
    return BORDERS.get(opt.removeprefix("lookahead_"), BORDER_OF_OTHERS)


def say_delay(delay: float) -> str:
    """D_0 for people."""
    return f"D_0 = {delay:.3g} update{'' if delay == 1 else 's'}" if delay else "no delay"


def say_update(recipe: Recipe) -> str:
    """What an update takes, and how old the first stage's gradients are by that."""
    parts = [f"{recipe.batch_size} images"]
    if recipe.accumulation_steps > 1:
        parts.append(f"{recipe.accumulation_steps}")
    if recipe.data_parallel > 1:
        parts.append(f"{recipe.data_parallel} replicas")
    late = say_delay(recipe.delay[0])
    if any(recipe.delay) and recipe.weight_prediction != "none":
        late += f", weights predicted to the {recipe.weight_prediction}"
    return f"{' x '.join(parts)} per update: {late}"


def above_border(delay: float, opt: str | None = None) -> str | None:
    """What is to be said of a D_0 above the border; None where it is not.

    Args:
        delay: D_0, in updates.
        opt: the optimizer; None: not known.
    """
    if delay <= (BORDER_OF_OTHERS if opt is None else border(opt)):
        return None
    others = ", ".join(f"{name}: {most:g}" for name, most in BORDERS.items())
    where = f"{BORDER_OF_OTHERS:g} ({others})" if opt is None else f"{border(opt):g} with opt={opt}"
    return f"{say_delay(delay)}, and above {where} training is expected to lose accuracy"


def advice(recipe: Recipe) -> str:
    """What to do about it, as settings that training accepts."""
    here = border(recipe.opt)
    better = [f"opt={name} (up to {most:g})" for name, most in BORDERS.items() if most > here]
    size = bearable_size(recipe.images_per_update, here, recipe.stages, recipe.data_parallel)
    images = "the same" if size == recipe.images_per_update else "more"
    larger = f"larger accumulation_steps at {images} images per update (update_size={size} max_delay={here:g})"
    return ", ".join([larger, "fewer stages", *better])
