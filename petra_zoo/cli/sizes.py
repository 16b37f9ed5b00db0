"""Sizes of images, as all commands take them."""

from __future__ import annotations

import re

from petra_zoo.errors import UserError


def image_size(text: str) -> tuple[int, int]:
    """Height and width from `224` or `192x256`.

    Raises:
        UserError: it says neither.
    """
    if not (match := re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", text)):
        raise UserError(f"--input-size {text}: expected pixels, such as 224 or 192x256 (height x width)")
    return int(match[1]), int(match[2] or match[1])


def input_size(text: str) -> tuple[int, int, int]:
    """Channels (three unless given), height and width from `224`, `192x256` or `1x28x28`.

    Raises:
        UserError: it says none of them.
    """
    channels, x, rest = text.partition("x")
    if x and "x" in rest and channels.isdecimal() and int(channels) > 0:
        return int(channels), *image_size(rest)
    return 3, *image_size(text)
