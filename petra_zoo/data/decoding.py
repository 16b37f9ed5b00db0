"""From an image in any mode to the RGB image that a network sees: upright, 8 bits per channel, by the mode's range."""

from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, TiffImagePlugin, UnidentifiedImageError

_BITS_PER_SAMPLE, _SAMPLE_FORMAT, _SIGNED = 258, 339, 2  # tags of a TIFF file, and a value of the second


def read_rgb(file: str | Path | BinaryIO) -> Image.Image:
    """Reads an image file with `to_rgb`; raises whatever Pillow's decoders raise."""
    if isinstance(file, str | Path):
        with open(file, "rb") as opened:  # by name, Pillow maps some TIFF files into memory, and turns these wrongly
            return read_rgb(opened)
    with Image.open(file) as image:
        return to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """Gives an image upright (by its EXIF orientation) in RGB.

    Grey values of 16 or 32 bits are scaled by the range of their type, and those of float images by theirs, 0 to 1.
    Pillow's own conversion takes all of them for 0 to 255, which gives white images and black ones.

    Raises:
        ValueError: a float image has values outside of 0 to 1. Besides, whatever Pillow's decoders raise.
    """
    image.load()
    if image.format is not None or image.info:  # from a file; in memory there is nothing to look up
        _set_upright(image)
    if image.mode.startswith("I"):
        values, highest = np.asarray(image), _highest(image)
        image = _to_8_bits((values.view(np.uint32) if highest == 2**32 - 1 else values) / highest)
    elif image.mode == "F":
        values = np.asarray(image)
        low, high = float(values.min()), float(values.max())
        if not (low >= 0.0 and high <= 1.0):  # also where there is a nan
            raise ValueError(f"float pixels from {low:g} to {high:g}; expected 0 to 1: save it scaled, or with 8 bits")
        image = _to_8_bits(values)
    image = image.convert("RGB")
    image.info = {}  # the orientation, so that it is applied once
    return image


def explain_bad_image(error: Exception) -> str:
    """Why an image cannot be read, in one line."""
    if isinstance(error, UnidentifiedImageError):  # Pillow names the file object
        return "its content is of no image format that Pillow knows"
    return (getattr(error, "strerror", None) or " ".join(str(error).split())) or type(error).__name__


def _set_upright(image: Image.Image) -> None:
    # Pillow turns the pixels before it writes the EXIF data anew, in which anything can be wrong: it does not matter.
    with suppress(Exception):
        ImageOps.exif_transpose(image, in_place=True)


def _highest(image: Image.Image) -> int:
    """The highest grey value: a TIFF file says how many bits it has; all others that Pillow opens so have 16."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        bits = image.tag_v2.get(_BITS_PER_SAMPLE, (16,))[0]
        signed = image.tag_v2.get(_SAMPLE_FORMAT, (1,))[0] == _SIGNED
        return 2 ** (bits - 1 if signed else bits) - 1
    return 2**16 - 1


def _to_8_bits(shares: npt.NDArray[np.floating]) -> Image.Image:
    """Grey from shares of the highest value [H, W]; what is negative becomes black."""
    return Image.fromarray(np.round(np.clip(shares, 0.0, 1.0) * 255.0).astype(np.uint8))
