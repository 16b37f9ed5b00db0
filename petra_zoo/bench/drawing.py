"""Charts as SVG, by matplotlib: the same bytes for the same chart and the same version of matplotlib."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import TYPE_CHECKING

from petra_zoo.bench.charts import Chart, Panel, Series, Source
from petra_zoo.errors import UserError

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

# Okabe and Ito's colours, which people of any colour vision tell apart; yellow, too light on white, is left out.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_MARKERS, _LINES = ("o", "^", "s", "D", "v", "P"), ("-", "--", ":", "-.")
_TICKS = (-50, -20, -10, -5, -2, -1, -0.5, 0, 0.5, 1, 2, 5, 10, 20, 50)  # of symlog
_APART = 0.012  # of the axis, to both sides: intervals at the same place stand side by side


def draw_chart(chart: Chart, source: Source) -> str:
    """The chart as SVG text, which says what it was drawn from.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("plots need matplotlib: pip install 'petra-zoo[plots]'") from error
    columns = min(chart.columns, len(chart.panels))
    rows = -(-len(chart.panels) // columns)
    style = matplotlib.rc_context(
        {
            "svg.hashsalt": "petra-zoo",  # else ids are random
            "font.size": 10,
            "axes.titlesize": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
        }
    )
    with style:
        figure = Figure(figsize=(4.8 * columns, 3.6 * rows + 0.5), layout="constrained")
        shown: dict[str, Artist] = {}
        for place, panel in enumerate(chart.panels, start=1):
            axes = figure.add_subplot(rows, columns, place)
            _draw_panel(axes, panel)
            handles, labels = axes.get_legend_handles_labels()
            shown |= dict(zip(labels, handles, strict=True))
        labels = _legend(chart)
        handles = [shown[label] for label in labels]
        figure.legend(handles, labels, loc="outside lower center", ncols=2 * columns, frameon=False)
        picture = io.StringIO()
        figure.savefig(picture, format="svg", metadata={"Date": None, "Creator": None, "Description": str(source)})
    return picture.getvalue()


def _legend(chart: Chart) -> list[str]:
    """Every label once, each behind the one that stands before it in some panel."""
    labels: list[str] = []
    for panel in chart.panels:
        place = len(labels)
        for series in panel.series:
            if series.label not in labels:
                labels.insert(place, series.label)
            place = labels.index(series.label) + 1
    return labels


def _draw_panel(axes: Axes, panel: Panel) -> None:
    for level in panel.levels:
        axes.axhline(level.y, color="0.45", linewidth=0.9, linestyle=(0, (4, 3)), zorder=0)
        axes.annotate(
            level.label,
            (1, level.y),
            xycoords=("axes fraction", "data"),
            xytext=(0, 2),
            textcoords="offset points",
            ha="right",
            fontsize=8,
            color="0.35",
        )
    if not panel.series:
        axes.text(0.5, 0.5, "nothing to measure", ha="center", color="0.35", transform=axes.transAxes)
    values = [point.x for series in panel.series for point in series.points]
    reach = _APART * (max(values, default=0.0) - min(values, default=0.0)) if panel.apart else 0.0
    middle = (len(panel.series) - 1) / 2
    for place, series in enumerate(panel.series):
        points = [point for point in series.points if panel.scale != "log" or point.y > 0]
        _draw_series(axes, replace(series, points=tuple(points)), reach * (place - middle) / max(middle, 1))
    if panel.scale == "symlog":
        low, high = axes.get_ylim()
        axes.set_yscale("symlog", linthresh=1, linscale=1)
        axes.set_ylim(1.2 * low, 1.2 * high)  # a margin looks smaller there
        axes.set_yticks([tick for tick in _TICKS if low <= tick <= high])
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
    else:
        axes.set_yscale(panel.scale)
    axes.set(title=panel.title, xlabel=panel.x, ylabel=panel.y)
    axes.grid(axis="y", alpha=0.25)


def _draw_series(axes: Axes, series: Series, shift: float) -> None:
    points = sorted(series.points, key=lambda point: point.x)
    many = len(points) > 30
    y = [point.y for point in points]
    reach = ([p.y - p.low for p in points], [p.high - p.y for p in points])
    axes.errorbar(
        [point.x + shift for point in points],
        y,
        yerr=None if reach == ([0.0] * len(y), [0.0] * len(y)) else reach,
        label=series.label,
        color=_COLORS[series.color % len(_COLORS)],
        marker="" if many else _MARKERS[series.marker % len(_MARKERS)],
        linestyle=_LINES[series.marker % len(_LINES)],
        markersize=5,
        linewidth=1.4,
        elinewidth=1.1,
        capsize=2.5,
    )
