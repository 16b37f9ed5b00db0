"""The first minute with petra-zoo: train on handwritten digits with PETRA, evaluate, look at some predictions."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

from petra_zoo.checkpoints.load import load_model
from petra_zoo.data.datasets import open_dataset
from petra_zoo.evaluation.checkpoint_evaluation import evaluate_checkpoint
from petra_zoo.training.run import train

RECIPE = "digits/petra_revnet_tiny"
SHADES = " .:-=+*#%@"


def run_demo(overrides: list[str]) -> Iterator[str]:
    """Trains, evaluates the saved run and shows digits; yields what to tell the user, as it happens."""
    yield "PETRA trains a reversible network on 1,437 handwritten digits: 4 stages, each of which runs the forward of"
    yield "one micro-batch and the backward of an older one in every tick, without storing activations."
    result = train(RECIPE, overrides)
    yield f"\ntrained in {result.training_seconds:.0f} s; the saved run, evaluated again:"
    report = evaluate_checkpoint(str(result.path), "digits")
    evaluation = report.evaluation
    yield f"  top-1 {evaluation.top1:.2f} %  loss {evaluation.loss:.4f}  on {evaluation.images} digits it has not seen"
    yield "\nsome of them, and what the network says:"
    yield from show_digits(result.path)
    yield "\ntry next:"
    yield f"  petra-zoo evaluate {shlex.quote(str(result.path))}"
    yield f"  petra-zoo train {RECIPE} method=backprop      # exact backpropagation, to compare"
    yield "  petra-zoo train shapes/petra_revnet_tiny       # harder images"
    yield "  petra-zoo list                                 # all networks"


def show_digits(run: Path, count: int = 5) -> Iterator[str]:
    """Digits of the validation split drawn with characters, side by side, with the saved model's predictions."""
    data = open_dataset("digits", "val")
    model = load_model(str(run), torch.device("cpu"))
    config = resolve_model_data_config(model)
    transform = create_transform(**config, is_training=False)
    shown = [data[i * (len(data) // count)] for i in range(count)]
    with torch.no_grad():
        confidence, best = model(torch.stack([transform(image) for image, _ in shown])).softmax(1).max(1)
    pictures = [_draw(image) for image, _ in shown]
    for row in zip(*pictures, strict=True):
        yield "   ".join(row)
    verdicts = [
        f"{int(guess)} ({float(sure):.0%})" + ("" if int(guess) == label else f" but {label}")
        for guess, sure, (_, label) in zip(best, confidence, shown, strict=True)
    ]
    yield "   ".join(verdict.ljust(16) for verdict in verdicts)


def _draw(image: Image.Image) -> list[str]:
    grey = np.asarray(image.convert("L"), dtype=int) * (len(SHADES) - 1) // 255
    return ["".join(SHADES[value] * 2 for value in row) for row in grey]
