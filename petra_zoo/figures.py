"""Pictures that matplotlib draws: an optional package, asked for before the work whose result they show."""

from __future__ import annotations

import logging
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from petra_zoo.errors import UserError
from petra_zoo.files import check_writable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NO_GLYPH = re.compile(r"Glyph (\d+) \(.*\) missing from")

_logger = logging.getLogger(__name__)


def check_figure(path: Path) -> None:
    """Refuses a picture that could not be drawn or written, before the work whose result it shows.

    Raises:
        UserError: matplotlib is not installed, has no such format, or the place cannot be written.
    """
    formats = new_figure(1, 1).canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in formats:
        raise UserError(f"cannot write the plot {path}: expected a name that ends in .png, .svg, .pdf or .jpg")
    check_writable(path)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches, which needs no display.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("a plot needs matplotlib: pip install 'petra-zoo[plots]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a figure in the format that its name says.

    Raises:
        UserError: there is no such format, or the place cannot be written.
    """
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write the plot {path}: {getattr(error, 'strerror', None) or error}") from error
    letters = [chr(int(match[1])) for one in found if (match := _NO_GLYPH.match(str(one.message)))]
    if letters:
        _logger.warning("%s: matplotlib's font has no %s: boxes are drawn", path, "".join(dict.fromkeys(letters)))
