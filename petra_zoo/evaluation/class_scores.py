"""Class by class: precision, recall, and a picture of what is taken for what."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from petra_zoo.errors import UserError
from petra_zoo.evaluation.checkpoint_evaluation import EvaluationReport
from petra_zoo.evaluation.scores import Scores
from petra_zoo.figures import new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NUMBERS_UP_TO, _NAMES_UP_TO = 20, 60  # classes; with more there is no room for them in a picture


@dataclass(frozen=True)
class ClassScores:
    """A class.

    Attributes:
        precision: share of the images taken for it that are of it, 0 to 1; nan where none is.
        recall: share of its images that are taken for it; nan where it has none.
        f1: of both; 0 where no image of the class is told.
        support: how many images it has.
        predicted: how many images are taken for it.
    """

    name: str
    precision: float
    recall: float
    f1: float
    support: int
    predicted: int


def class_scores(scores: Scores, names: Sequence[str]) -> list[ClassScores]:
    """Of every class, in the model's order."""
    hits, support, predicted = (
        x.tolist() for x in (scores.confusion.diagonal(), scores.confusion.sum(1), scores.confusion.sum(0))
    )
    return [
        ClassScores(name, _share(hit, taken), _share(hit, own), _share(2 * hit, own + taken), own, taken)
        for name, hit, own, taken in zip(names, hits, support, predicted, strict=True)
    ]


def write_class_scores(path: Path, reports: Sequence[EvaluationReport]) -> None:
    """A CSV with a row for each class of each evaluation; what is not a number is empty.

    Raises:
        UserError: it cannot be written.
    """
    rows = [
        {"model": report.model, "dataset": report.dataset, "class": row.name, **asdict(row)}
        for report in reports
        for row in class_scores(report.evaluation, report.class_names)
    ]
    try:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [key for key in rows[0] if key != "name"], extrasaction="ignore")
            writer.writeheader()
            writer.writerows({key: _cell(value) for key, value in row.items()} for row in rows)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def draw_confusion(path: Path, reports: Sequence[EvaluationReport]) -> None:
    """Draws the confusion matrices side by side: of each class's images, the share that is taken for each.

    Classes without images for which nothing is taken are left out.

    Raises:
        UserError: matplotlib is missing, or the picture cannot be written.
    """
    shown = [_seen_classes(report.evaluation) for report in reports]
    sides = [min(12.0, max(4.0, 0.42 * len(classes)) + 1.2) for classes in shown]
    figure = new_figure(sum(sides) + 0.8, max(sides) + 0.4)
    panels = figure.subplots(1, len(reports), squeeze=False, width_ratios=sides)[0]
    for axes, report, classes in zip(panels, reports, shown, strict=True):
        _draw(axes, report, classes)
    save_figure(figure, path)


def _draw(axes: Axes, report: EvaluationReport, classes: Sequence[int]) -> None:
    counts = report.evaluation.confusion[classes][:, classes]
    shares = counts / report.evaluation.confusion.sum(1)[classes, None].clamp_min(1)
    axes.imshow(shares.numpy(), cmap="Blues", vmin=0.0, vmax=1.0)
    names = [report.class_names[i] for i in classes]
    if len(names) <= _NAMES_UP_TO:
        axes.set_xticks(range(len(names)), names, rotation=90 if max(map(len, names)) > 2 else 0)
        axes.set_yticks(range(len(names)), names)
    if len(names) <= _NUMBERS_UP_TO:
        for row, column in counts.nonzero().tolist():
            color = "white" if float(shares[row, column]) > 0.5 else "black"
            axes.text(column, row, f"{int(counts[row, column])}", ha="center", va="center", color=color, fontsize=8)
    axes.set(xlabel="taken for", ylabel="is")
    axes.set_title(f"{report.model}\non {report.dataset}, top-1 {report.evaluation.top1:.2f} %", fontsize=9, wrap=True)


def _seen_classes(scores: Scores) -> list[int]:
    seen: list[int] = (scores.confusion.sum(0) + scores.confusion.sum(1)).nonzero().flatten().tolist()
    return seen


def _cell(value: str | float) -> str | float:
    """A number to the digits that a few hundred images can tell."""
    if not isinstance(value, float):
        return value
    return "" if math.isnan(value) else round(value, 4)


def _share(part: int, whole: int) -> float:
    return part / whole if whole else math.nan
