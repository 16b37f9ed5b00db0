"""Numbers in sentences."""

from __future__ import annotations


def counted(number: int, noun: str) -> str:
    """Such as ``1 epoch``, ``3 batches``.

    Args:
        number: how many.
        noun: of one of them.
    """
    if number != 1:
        noun += "es" if noun.endswith(("tch", "ss")) else "s"
    return f"{number} {noun}"
