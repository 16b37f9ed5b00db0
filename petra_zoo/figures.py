"""Pictures that matplotlib draws: an optional package, asked for before the work whose result they show."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from petra_zoo.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def require_matplotlib() -> None:
    """Refuses to go on without it.

    Raises:
        UserError: it is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError("a plot needs matplotlib: pip install 'petra-zoo[plots]'") from error


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches, which needs no display.

    Raises:
        UserError: matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a figure in the format that its name says.

    Raises:
        UserError: there is no such format, or the place cannot be written.
    """
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write the plot {path}: {getattr(error, 'strerror', None) or error}") from error
