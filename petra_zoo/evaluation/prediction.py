"""What a trained model sees in image files, with the preprocessing and the label names that travel with it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from petra_zoo.checkpoints.load import load_model
from petra_zoo.data.batch_transform import BatchTransform
from petra_zoo.data.decoding import read_rgb
from petra_zoo.data.image_dataset import BadImage, ImageDataset
from petra_zoo.data.labels import shown_names
from petra_zoo.data.loader import Reading, check_channels, create_loader
from petra_zoo.data.preprocessing import Preprocessing
from petra_zoo.device import choose_device
from petra_zoo.errors import Failure, UserError
from petra_zoo.models.classifier import Classifier
from petra_zoo.progress import tracked
from petra_zoo.settings.types import BadImagePolicy
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


class Seen(NamedTuple):
    """What came of an image: its classes, and what the classifier read, float32 [features], where it is asked for."""

    prediction: ImagePrediction
    features: Tensor | None


@dataclass(frozen=True)
class PredictionOptions:
    """How images are classified; nothing but `topk` changes what comes out.

    Attributes:
        topk: classes per image; fewer where the model has fewer.
        batch_size: images at a time.
        workers: processes that read images; 0: this one.
        device: ``cpu`` or ``cuda``; None: the GPU where there is one.
        on_bad_image: `skip` leaves out what cannot be read, and a line names it; `fail` raises.
        features: give what the classifier reads, too.
        progress: show a bar where it takes long and a person watches.
    """

    topk: int = 5
    batch_size: int = BATCH
    workers: int = 0
    device: str | None = None
    on_bad_image: BadImagePolicy = "fail"
    features: bool = False
    progress: bool = False


def predict_images(
    source: str, images: Sequence[Path], *, topk: int = 5, device: str | None = None
) -> list[ImagePrediction]:
    """Classifies image files; see `look_at`.

    Args:
        source, images: as there.
        topk, device: see `PredictionOptions`.
    """
    return [seen.prediction for seen in look_at(source, images, PredictionOptions(topk=topk, device=device))]


def look_at(source: str, images: Sequence[Path], options: PredictionOptions | None = None) -> Iterator[Seen]:
    """Classifies image files, in their order, as they are done.

    Args:
        source: a run directory, ``hf-hub:``/``local-dir:``, or a name with pretrained weights.
        images: files of any format that Pillow reads.
        options: how.

    Raises:
        UserError: the model cannot be had, has no classifier or takes neither grey nor RGB images, or an image cannot
            be read (named in the message).
        Failure: a logit is not finite; names the image.
    """
    options = options or PredictionOptions()
    if not images:
        return
    where = choose_device(options.device)
    model = load_model(source, where)
    wants = Preprocessing.of(model)
    _check(model, source, wants, options.features)
    data, names = _Files(images, options.on_bad_image), shown_names(model)
    reading = Reading(options.workers, "skip", leave_out=True)
    loader = create_loader(data, wants, batch_size=min(options.batch_size, len(images)), reading=reading)
    transform, done = BatchTransform(wants, where), 0
    read = loader.read()
    for (pixels,), labels in tracked(read, "predicting", len(loader)) if options.progress else read:
        paths = images[done : done + len(labels)]
        done += len(labels)
        logits, features = _run(model, transform(pixels.to(where)), options.features)
        for place in (labels >= 0).nonzero().flatten().tolist():
            probabilities = logits[place].softmax(0)
            if not probabilities.isfinite().all():
                raise Failure(
                    f"{source} gives no finite logits for {paths[place]}: its training has diverged, or the image is "
                    "odd"
                )
            prediction = ImagePrediction(str(paths[place]), _best(probabilities, options.topk, names))
            yield Seen(prediction, None if features is None else features[place].clone())


class _Files(ImageDataset):
    """Image files whose classes nobody knows."""

    def __init__(self, files: Sequence[Path], on_bad_image: BadImagePolicy) -> None:
        super().__init__(["unknown"])
        self._files, self._on_bad_image = files, on_bad_image

    def __len__(self) -> int:
        return len(self._files)

    def read(self, index: int) -> tuple[Image.Image, int]:
        return read_rgb(self._files[index]), 0

    def source(self, index: int) -> str:
        return str(self._files[index])

    def note_bad(self, bad: Sequence[BadImage]) -> None:
        if bad and self._on_bad_image == "fail":
            raise UserError(
                f"{bad[0].source} cannot be read as an image: {bad[0].reason}; replace the file, or leave it out by "
                "--on-bad-image skip"
            )
        super().note_bad(bad)


def _check(model: Classifier, source: str, wants: Preprocessing, features: bool) -> None:
    if model.num_classes < 1:
        raise UserError(f"{source} has no classifier: fine-tune it first, or use it for its features through timm")
    if features and not hasattr(model, "forward_head"):
        raise UserError(f"{source} gives no features: it has no forward_head, as timm's networks have")
    try:
        check_channels(wants.input_size, wants.mean, wants.std)
    except UserError as error:
        raise UserError(f"{source} cannot be fed with image files: {error}") from error


@torch.inference_mode()
def _run(model: Classifier, images: Tensor, with_features: bool) -> tuple[Tensor, Tensor | None]:
    """Logits [B, classes] and what the classifier reads [B, features], float32 on the CPU."""
    if not with_features:
        return model(images).float().cpu(), None
    found = model.forward_features(images)
    features, logits = model.forward_head(found, pre_logits=True), model.forward_head(found)
    return logits.float().cpu(), features.float().cpu()


def _best(probabilities: Tensor, topk: int, names: list[str]) -> list[Guess]:
    values, indices = probabilities.topk(min(topk, len(probabilities)))
    return [Guess(names[i], i, p) for i, p in zip(indices.tolist(), values.tolist(), strict=True)]
