"""What a trained model sees in image files, with the preprocessing and the label names that travel with it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor

from petra_zoo.checkpoints.load import load_model
from petra_zoo.data.decoding import explain_bad_image, read_rgb
from petra_zoo.data.labels import shown_names
from petra_zoo.data.loader import check_channels
from petra_zoo.data.preprocessing import Preprocessing
from petra_zoo.device import choose_device
from petra_zoo.errors import Failure, UserError
from petra_zoo.strict_json import JsonObject

BATCH = 32


@dataclass(frozen=True)
class Guess:
    """A class and its softmax probability, 0 to 1."""

    label: str
    index: int
    probability: float


@dataclass(frozen=True)
class ImagePrediction:
    """The most probable classes of one image, best first."""

    image: str
    guesses: list[Guess]

    def as_dict(self) -> JsonObject:
        """For JSON."""
        return asdict(self)


def predict_images(
    source: str, images: Sequence[Path], *, topk: int = 5, device: str | None = None
) -> list[ImagePrediction]:
    """Classifies image files.

    Args:
        source: a run directory, ``hf-hub:``/``local-dir:``, or a name with pretrained weights.
        images: files of any format that Pillow reads.
        topk: classes per image; fewer where the model has fewer.
        device: ``cpu`` or ``cuda``; None: the GPU where there is one.

    Raises:
        UserError: the model cannot be had, has no classifier or takes neither grey nor RGB images, or an image cannot
            be read (named in the message).
        Failure: a logit is not finite; names the image.
    """
    where = choose_device(device)
    model = load_model(source, where)
    if model.num_classes < 1:
        raise UserError(f"{source} has no classifier: fine-tune it first, or use it for its features through timm")
    wants = Preprocessing.of(model)
    try:
        check_channels(wants.input_size, wants.mean, wants.std)
    except UserError as error:
        raise UserError(f"{source} cannot be fed with image files: {error}") from error
    transform = create_transform(**wants.as_dict(), is_training=False)
    grey = wants.input_size[0] == 1
    names = shown_names(model)
    found = []
    for start in range(0, len(images), BATCH):
        paths = images[start : start + BATCH]
        batch = torch.stack([transform(_read(path, grey)) for path in paths]).to(where)
        with torch.inference_mode():
            probabilities = model(batch).float().softmax(1)
        finite = probabilities.isfinite().all(1).tolist()
        if not all(finite):
            image = paths[finite.index(False)]
            raise Failure(
                f"{source} gives no finite logits for {image}: its training has diverged, or the image is odd"
            )
        for path, guesses in zip(paths, _best(probabilities, topk, names), strict=True):
            found.append(ImagePrediction(str(path), guesses))
    return found


def _read(path: Path, grey: bool) -> Image.Image:
    try:
        image = read_rgb(path)
    except MemoryError:  # which says nothing of the image
        raise
    except Exception as error:  # Pillow's plugins report damaged files with almost any
        raise UserError(f"{path} cannot be read as an image: {explain_bad_image(error)}") from error
    return image.convert("L") if grey else image


def _best(probabilities: Tensor, topk: int, names: list[str]) -> Iterator[list[Guess]]:
    values, indices = probabilities.topk(min(topk, probabilities.shape[1]), dim=1)
    for row, places in zip(values.tolist(), indices.tolist(), strict=True):
        yield [Guess(names[i], i, p) for i, p in zip(places, row, strict=True)]
