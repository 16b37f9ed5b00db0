"""Class by class, and how sure a model is: numbers that scikit-learn gives too."""

import csv
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.calibration import calibration_curve
from sklearn.metrics import precision_recall_fscore_support
from torch import Tensor

from petra_zoo.data.datasets import open_dataset
from petra_zoo.data.preprocessing import Preprocessing
from petra_zoo.errors import UserError
from petra_zoo.evaluation.calibration import BINS, calibration_error
from petra_zoo.evaluation.checkpoint_evaluation import EvaluationReport
from petra_zoo.evaluation.class_scores import class_scores, draw_confusion, write_class_scores
from petra_zoo.evaluation.mistakes import mistakes_sheet, save_mistakes, surest_mistakes
from petra_zoo.evaluation.scores import score

NAMES = [*"abcdefgh", "never seen", "never told"]


def logits_and_labels(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 9, (200,), generator=generator)
    labels[labels == 8] = 9
    logits = torch.randn(200, 10, generator=generator) + 1.5 * torch.nn.functional.one_hot(labels, 10)
    logits[:, 9] = -9.0
    return logits, labels


def report(**changes: object) -> EvaluationReport:
    logits, labels = logits_and_labels()
    probabilities = logits.softmax(1)
    made = EvaluationReport(
        model="net", dataset="shapes", evaluation=score([(logits, labels)], 10), parameters=1,
        preprocessing=Preprocessing((3, 8, 8), (0.5,) * 3, (0.5,) * 3), class_names=NAMES, bad_images=0, batch_size=1,
        peak_memory=1, predictions=logits.argmax(1), labels=labels, confidences=probabilities.amax(1),
        indices=torch.arange(200), data=open_dataset("shapes:10x200", "val"), tta=False, fingerprints=[],
        weights_sha256=None, date="",
    )  # fmt: skip
    return replace(made, **changes)  # type: ignore[arg-type]


def test_letters_that_the_font_does_not_have_are_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_confusion(tmp_path / "a.png", [report(class_names=["\N{CJK UNIFIED IDEOGRAPH-65E5}", *NAMES[1:]])])
    assert "has no \N{CJK UNIFIED IDEOGRAPH-65E5}: boxes are drawn" in caplog.text


def test_precision_recall_and_support_are_scikit_learns() -> None:
    logits, labels = logits_and_labels()
    expected = precision_recall_fscore_support(labels, logits.argmax(1), labels=range(10), zero_division=np.nan)
    found = class_scores(score([(logits, labels)], 10), NAMES)
    for name, values in zip(("precision", "recall", "support"), (expected[0], expected[1], expected[3]), strict=True):
        np.testing.assert_allclose([getattr(row, name) for row in found], values, rtol=1e-12, err_msg=name)
    told = [i for i, row in enumerate(found) if row.support and row.predicted]
    np.testing.assert_allclose([found[i].f1 for i in told], expected[2][told], rtol=1e-12)


def test_the_csv_has_a_row_for_each_class_of_each_evaluation(tmp_path: Path) -> None:
    write_class_scores(tmp_path / "c.csv", [report(), report(dataset="other")])
    with (tmp_path / "c.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == 2 * NAMES
    assert {row["dataset"] for row in rows} == {"shapes", "other"}
    assert rows[8]["recall"] == ""
    assert rows[9]["precision"] == ""


def test_the_calibration_error_is_that_of_scikit_learns_curve() -> None:
    logits, labels = logits_and_labels()
    confidences, predictions = logits.softmax(1).max(1)
    correct = predictions == labels
    accuracy, confidence = calibration_curve(correct, confidences, n_bins=BINS, strategy="uniform")
    counts = np.histogram(confidences, np.linspace(0, 1, BINS + 1))[0]
    expected = 100 * float((np.abs(accuracy - confidence) * counts[counts > 0]).sum()) / len(labels)
    assert calibration_error(confidences, correct) == pytest.approx(expected, rel=1e-6)


def test_a_model_that_is_right_as_often_as_it_says_has_no_calibration_error() -> None:
    assert calibration_error(torch.full((4,), 0.75), torch.tensor([1, 1, 1, 0])) == 0.0
    assert calibration_error(torch.ones(4), torch.zeros(4)) == 100.0


def test_the_surest_mistakes_come_first_and_are_told_by_name(tmp_path: Path) -> None:
    found = report()
    places = surest_mistakes(found, 5)
    assert len(places) == 5
    assert all(found.predictions[i] != found.labels[i] for i in places)
    assert [float(found.confidences[i]) for i in places] == sorted(float(found.confidences[i]) for i in places)[::-1]
    sheet = mistakes_sheet(found, 5)
    assert sheet.width == 5 * (128 + 8) + 8


def test_where_there_are_no_mistakes_a_line_says_that_nothing_is_drawn(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = report()
    save_mistakes(replace(found, predictions=found.labels), tmp_path / "m.png")
    assert "net makes no mistakes on shapes" in caplog.text
    assert not (tmp_path / "m.png").exists()


def test_the_matrix_of_several_evaluations_is_drawn_side_by_side(tmp_path: Path) -> None:
    draw_confusion(tmp_path / "one.png", [report()])
    draw_confusion(tmp_path / "two.png", [report(), report()])
    with Image.open(tmp_path / "one.png") as one, Image.open(tmp_path / "two.png") as two:
        assert two.width > 1.8 * one.width


def test_a_picture_of_an_unknown_kind_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot write the plot .*matrix\.nothing"):
        draw_confusion(tmp_path / "matrix.nothing", [report()])
