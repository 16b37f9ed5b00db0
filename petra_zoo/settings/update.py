"""An update: how many images it takes, in how many micro-batches, and how old its gradients are by that.

The k micro-batches of an update decide the delay of the first stage, D_0 = 2 (J - 1) / k updates, and D_0 decides
whether training without a flush loses accuracy. At the same images per update, a larger k means smaller micro-batches.
"""

from __future__ import annotations

import math

SMALLEST_FOR_BATCH_NORM = 8  # images: mean and variance of fewer say too little of the data's


def share_out(update_size: int, accumulation_steps: int, replicas: int) -> int:
    """Images per micro-batch, where an update of all replicas together takes so many.

    Raises:
        ValueError: they cannot be shared out evenly; gives the nearest numbers that can.
    """
    parts = accumulation_steps * replicas
    if update_size % parts:
        below = update_size // parts * parts
        nearest = f"{below} or {below + parts}" if below else f"{parts}"
        raise ValueError(
            f"update_size={update_size} cannot be shared out evenly over accumulation_steps={accumulation_steps} x "
            f"data_parallel={replicas}; nearest: {nearest}"
        )
    return update_size // parts


def choose_accumulation_steps(update_size: int, max_delay: float, stages: int, replicas: int, method: str) -> int:
    """The smallest k that divides an update and keeps its gradients young enough: D_0 <= max_delay.

    It is the same whatever the method. One without delay could do with k = 1, but it is there to be compared with, and
    batch norms see micro-batches. Only where no k would do for the others does it get 1.

    Args:
        update_size: images, of all replicas together.
        max_delay: of the first stage, in updates.
        stages: J.
        replicas: that share every update.
        method: its name.

    Raises:
        ValueError: no k does; says what would.
    """
    for k in _divisors(share_out(update_size, 1, replicas)):
        if _delay(stages, k) <= max_delay:
            return k
    if not _delay(stages, 1, method):
        return 1
    _refuse_zero(max_delay, stages, method)
    raise ValueError(
        f"update_size={update_size} is too small for max_delay={max_delay:g} with stages={stages}: single images as "
        f"micro-batches would still be too late; nearest: {nearest_choices(update_size, max_delay, stages, replicas)}"
    )


def check_max_delay(
    max_delay: float, stages: int, accumulation_steps: int, method: str, *, images_per_update: int
) -> None:
    """Refuses a larger delay, where k was given and not chosen.

    Raises:
        ValueError: says how to have k chosen, and which k would do.
    """
    delay = _delay(stages, accumulation_steps, method)
    if delay <= max_delay:
        return
    _refuse_zero(max_delay, stages, method)
    raise ValueError(
        f"max_delay={max_delay:g}, but D_0 = {delay:.3g} updates with stages={stages} and accumulation_steps="
        f"{accumulation_steps}: set update_size={images_per_update} too, so that both choose accumulation_steps and "
        f"batch_size, or set accumulation_steps={math.ceil(_delay(stages, 1, method) / max_delay)}"
    )


def nearest_choices(update_size: int, max_delay: float, stages: int, replicas: int, smallest: int = 1) -> str:
    """What each setting would have to be, alone, for k to leave micro-batches of at least `smallest` images."""
    k = max(1, math.ceil(_delay(stages, 1) / max_delay)) if max_delay else 1
    nearest = [f"update_size={k * replicas * max(smallest, math.ceil(update_size / (k * replicas)))}"]
    share = update_size // replicas
    if most := max((k for k in _divisors(share) if share // k >= smallest), default=0):
        fewer = max(j for j in range(1, stages + 1) if _delay(j, most) <= max_delay)
        nearest += [f"stages={fewer}", f"max_delay={math.ceil(100 * _delay(stages, most)) / 100:g}"]
    return " or ".join(nearest)


def bearable_size(update_size: int, max_delay: float, stages: int, replicas: int) -> int:
    """The images of an update, as many or the nearest more, whose micro-batches are large enough for batch norm."""
    fewest = math.ceil(_delay(stages, 1) / max_delay)
    share = update_size // replicas
    if any(k >= fewest and share // k >= SMALLEST_FOR_BATCH_NORM for k in _divisors(share)):
        return update_size
    parts = fewest * replicas
    return parts * max(SMALLEST_FOR_BATCH_NORM, math.ceil(update_size / parts))


def _delay(stages: int, accumulation_steps: int, method: str = "petra") -> float:
    """D_0 in updates."""
    from petra_zoo.petra.methods import find_method  # with torch behind it: only where a recipe is used

    return find_method(method).delay(stages, accumulation_steps)[0]


def _refuse_zero(max_delay: float, stages: int, method: str) -> None:
    if max_delay == 0:
        raise ValueError(
            f"max_delay=0: with stages={stages}, gradients of method={method} are late however many accumulation_steps "
            "there are; expected more than 0, or stages=1, or method=backprop"
        )


def _divisors(number: int) -> list[int]:
    low = [k for k in range(1, math.isqrt(number) + 1) if number % k == 0]
    return [*low, *(number // k for k in reversed(low) if k * k != number)]
