"""The training curve as a picture."""

from __future__ import annotations

import csv
import io
from pathlib import Path


def training_curve(summary: Path) -> bytes:
    """PNG of loss and accuracy over the epochs of a summary.csv; the same bytes for the same numbers."""
    from matplotlib.figure import Figure

    with summary.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    epochs = [int(row["epoch"]) for row in rows]
    figure = Figure(figsize=(8, 3), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    marker = "." if len(rows) < 50 else ""
    for column, label in (("train_loss", "training"), ("eval_loss", "validation")):
        loss.plot(epochs, [float(row[column] or "nan") for row in rows], marker=marker, label=label)
    loss.set(xlabel="epoch", ylabel="cross-entropy")
    loss.legend()
    accuracy.plot(epochs, [float(row["eval_top1"]) for row in rows], marker=marker, color="tab:green")
    accuracy.set(xlabel="epoch", ylabel="validation top-1, %")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120, metadata={"Software": None})
    return picture.getvalue()
