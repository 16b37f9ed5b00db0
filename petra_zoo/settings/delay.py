"""What the delay of the first stage means for accuracy, and how people are told."""

from __future__ import annotations

from petra_zoo.settings.recipe import Recipe
from petra_zoo.settings.update import bearable_size
from petra_zoo.wording import counted

# Above which D_0 (delay of the first stage, in updates) people are warned, by family of optimizers: between the delays
# that docs/evidence.md has measured, where that study shows little loss and where it shows more.
BORDERS = {
    "muon": 3.0,  # with four stages half a point less; at 6 a point
    "sgd": 2.0,  # at 6 a clear loss
    "nadam": 2.0,  # at 6 well below backpropagation in the search for learning rates
}
# None of these was measured. Elsewhere AdamW came out level at a delay of 2 at most (arXiv 2606.07881).
BORDER_OF_OTHERS = 2.0
# The borders are of a network with batch norm; one without was behind at every delay that was tried, from 1 on.
WITHOUT_BATCH_NORM = (
    "without batch norm a delay costs more: trained from scratch a transformer lost points at D_0 = 1, a ResNet with "
    "group norm at 3.25 (docs/evidence.md): compare with method=reversible"
)
# timm's names of the same step: with Nesterov's momentum or without, weight decay apart or not, fused.
FAMILIES = {
    "muon": ("muon", "nmuon"),
    "sgd": ("sgd", "nesterov", "momentum", "sgdw", "nesterovw", "fusedsgd"),
    "nadam": ("nadam", "nadamw", "nadamlegacy"),
}
_FAMILY_OF = {name: family for family, names in FAMILIES.items() for name in names}


def family(opt: str) -> str | None:
    """The family of an optimizer of timm's; None where none of its kind was measured."""
    return _FAMILY_OF.get(opt.removeprefix("lookahead_"))


def border(opt: str) -> float:
    """The largest D_0, in updates, at which training with an optimizer of timm's brings no warning."""
    return BORDERS.get(family(opt) or "", BORDER_OF_OTHERS)


def say_delay(delay: float) -> str:
    """D_0 for people."""
    return f"D_0 = {delay:.3g} update{'' if delay == 1 else 's'}" if delay else "no delay"


def say_update(recipe: Recipe) -> str:
    """What an update takes, and how old the first stage's gradients are by that."""
    parts = [counted(recipe.batch_size, "image")]
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
    if opt is None:
        where = f"{BORDER_OF_OTHERS:g} ({', '.join(f'{name}: {most:g}' for name, most in _better_than_others())})"
    else:
        where = f"{border(opt):g} with opt={opt}{'' if family(opt) else ', which was not measured,'}"
    return f"{say_delay(delay)}, and above {where} training is expected to lose accuracy"


def advice(recipe: Recipe) -> str:
    """What to do about it, as settings that training accepts."""
    here = border(recipe.opt)
    better = [f"opt={name} (up to {most:g})" for name, most in _better_than_others() if most > here]
    size = bearable_size(recipe.images_per_update, here, recipe.stages, recipe.data_parallel)
    images = "the same" if size == recipe.images_per_update else "more"
    larger = f"larger accumulation_steps at {images} images per update (update_size={size} max_delay={here:g})"
    return ", ".join([larger, "fewer stages", *better])


def _better_than_others() -> list[tuple[str, float]]:
    return [(name, most) for name, most in BORDERS.items() if most > BORDER_OF_OTHERS]
