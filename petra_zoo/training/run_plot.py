"""One or more runs in one picture: loss, accuracy, learning rate and throughput."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from petra_zoo.errors import UserError
from petra_zoo.figures import new_figure, save_figure
from petra_zoo.strict_json import Json
from petra_zoo.training.runs import read_log, read_summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Line = list[tuple[float, float]]  # epochs done, and a value


@dataclass(frozen=True)
class Curves:
    """What a run has logged, over the epochs that were done.

    Attributes:
        training: loss, top1, lr and images_per_second of what was logged while it trained; where epochs are too short
            for a line in the log each, loss and lr are those of whole epochs.
        validation: loss and top1 of every validation.
    """

    run: Path
    training: Mapping[str, Line]
    validation: Mapping[str, Line]

    @classmethod
    def of(cls, run: Path) -> Curves:
        """Read from a run's directory.

        Raises:
            UserError: it is none, or has logged nothing yet.
        """
        if not run.is_dir():
            raise UserError(f"there is no run {run}; petra-zoo runs lists those there are")
        lines, rows = list(read_log(run)), read_summary(run)
        logged = [line for line in lines if line.get("event") == "train"]
        if not (logged or rows):
            raise UserError(f"{run} has logged nothing yet: expected a run's directory, with metrics.jsonl in it")
        per_epoch = _updates_per_epoch(lines)
        ends = [_validated_at(lines, int(row["epoch"]), per_epoch) for row in rows]
        by_epoch = {key: _line(ends, [row.get(key) for row in rows]) for key in rows[0]} if rows else {}
        places = [_number(line, "update") / per_epoch for line in logged]
        keys = ("loss", "top1", "lr", "images_per_second")
        training = {key: _line(places, [line.get(key) for line in logged]) for key in keys}
        training["loss"] = max(training["loss"], by_epoch.get("train_loss", []), key=len)
        training["lr"] = max(training["lr"], by_epoch.get("lr", []), key=len)
        return cls(run, training, {key: by_epoch.get(f"eval_{key}", []) for key in ("loss", "top1")})


def plot_runs(runs: Sequence[Path], output: Path) -> None:
    """Draws the runs over their epochs, each in a colour of its own.

    Raises:
        UserError: a run has nothing to draw, matplotlib is missing, or the picture cannot be written.
    """
    found = [Curves.of(run) for run in runs]
    names = _names(runs)
    figure = new_figure(11, 6.5 + 0.22 * len(runs))
    loss, accuracy, rate, speed = figure.subplots(2, 2, sharex=True).flatten()
    for number, (curves, name) in enumerate(zip(found, names, strict=True)):
        color = f"C{number % 10}"
        for axes, key in ((loss, "loss"), (accuracy, "top1")):
            _draw(axes, curves.training[key], color, thin=True)
            _draw(axes, curves.validation[key], color, label=name)
        _draw(rate, curves.training["lr"], color)
        _draw(speed, curves.training["images_per_second"], color)
    for axes, title in ((loss, "loss"), (accuracy, "top-1, %")):
        axes.set_title(f"{title} (thin: in training; thick: validation)", fontsize=10)
    rate.set_title("learning rate", fontsize=10)
    speed.set_title("images per second, in training", fontsize=10)
    speed.set_ylim(bottom=0)
    for axes in (loss, accuracy, rate, speed):
        axes.grid(alpha=0.3)
        if not axes.lines:
            axes.text(0.5, 0.5, "nothing was logged", ha="center", va="center", transform=axes.transAxes)
    for axes in (rate, speed):
        axes.set_xlabel("epochs")
    handles, labels = loss.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=1, frameon=False)
    save_figure(figure, output)


def _draw(axes: Axes, line: Line, color: str, *, thin: bool = False, label: str | None = None) -> None:
    if not (line or label):
        return
    x, y = zip(*line, strict=True) if line else ((), ())
    marker = "o" if not thin and len(line) <= 30 else ""
    width, alpha = (1.0, 0.55) if thin else (1.8, 1.0)
    axes.plot(x, y, color=color, linewidth=width, alpha=alpha, marker=marker, markersize=3.5, label=label)


def _line(places: Sequence[float], values: Sequence[Json]) -> Line:
    """What is a number, at its place."""
    return [(x, float(y)) for x, y in zip(places, values, strict=True) if isinstance(y, int | float | str) and y != ""]


def _updates_per_epoch(lines: Sequence[Mapping[str, Json]]) -> float:
    """Of a log whose lines have their epoch and the updates so far.

    Exact once a whole epoch was validated; before, as many as make no line belong to another epoch than its own.
    """
    pairs = [(_number(line, "epoch"), _number(line, "update")) for line in lines]
    return max((update / epoch for epoch, update in pairs if epoch and update), default=1.0)


def _validated_at(lines: Sequence[Mapping[str, Json]], epoch: int, per_epoch: float) -> float:
    """Epochs done at a validation: fewer than its number where `max_updates` ended the run in the middle of one."""
    found = [line for line in lines if line.get("event") == "validation" and line.get("epoch") == epoch]
    done = _number(found[-1], "update") / per_epoch if found else 0.0
    return done if 0.0 < done <= epoch - 1 / per_epoch else epoch  # a window that an epoch's end cuts counts behind it


def _number(line: Mapping[str, Json], key: str) -> int:
    value = line.get(key)
    return value if isinstance(value, int) else 0


def _names(runs: Sequence[Path]) -> list[str]:
    """The directories' own names; whole paths where two are alike."""
    short = [run.resolve().name for run in runs]
    return short if len({*short}) == len(short) else [str(run) for run in runs]
