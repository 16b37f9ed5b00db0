"""The mistakes that a model is surest of: wrong labels, confusing images, and what it has not learnt."""

from __future__ import annotations

import logging
from pathlib import Path

from PIL import Image

from petra_zoo.data.contact_sheet import Tile, contact_sheet, save_picture
from petra_zoo.evaluation.checkpoint_evaluation import EvaluationReport

_logger = logging.getLogger(__name__)


def surest_mistakes(report: EvaluationReport, count: int) -> list[int]:
    """Which of the report's images are told wrong, those with the highest probability first."""
    wrong = (report.predictions != report.labels).nonzero().flatten()
    order = report.confidences[wrong].argsort(descending=True, stable=True)
    found: list[int] = wrong[order][:count].tolist()
    return found


def mistakes_sheet(report: EvaluationReport, count: int = 32) -> Image.Image:
    """These images, each with what it is, what it is taken for and how surely, and its file where it has one.

    Args:
        report: with one mistake at least.
        count: how many images.
    """
    return contact_sheet([_tile(report, place) for place in surest_mistakes(report, count)])


def save_mistakes(report: EvaluationReport, path: Path) -> bool:
    """Writes the sheet of a report, and tells whether: where there are no mistakes, a line says so.

    Raises:
        UserError: it cannot be written.
    """
    if bool((report.predictions == report.labels).all()):
        _logger.warning("%s makes no mistakes on %s: %s is not written", report.model, report.dataset, path)
        return False
    save_picture(mistakes_sheet(report), path)
    return True


def _tile(report: EvaluationReport, place: int) -> Tile:
    index = int(report.indices[place])
    image, _ = report.data[index]
    names = report.class_names
    is_, taken_for = names[int(report.labels[place])], names[int(report.predictions[place])]
    lines = [f"is {is_}", f"{float(report.confidences[place]):.1%} {taken_for}", Path(report.data.source(index)).name]
    return Tile(image, lines)
