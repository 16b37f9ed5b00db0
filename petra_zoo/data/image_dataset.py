"""What every data set here is: indexed RGB images with integer labels, and what happens when an image is broken."""

import hashlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch.utils.data import Dataset

from petra_zoo.data.decoding import explain_bad_image, to_rgb
from petra_zoo.errors import UserError
from petra_zoo.settings.types import BadImagePolicy

Split = Literal["train", "val"]

_logger = logging.getLogger(__name__)


class DataError(UserError):
    """The data is missing, unreadable, or not what the settings say it is."""


@dataclass(frozen=True)
class BadImage:
    """An image that could not be decoded: its index, its source (a file where there is one), and the reason."""

    index: int
    source: str
    reason: str

    def __str__(self) -> str:
        return f"{self.source} cannot be read ({self.reason})"


def fingerprint(image: Image.Image) -> bytes:
    """The same for images whose pixels are, whatever file they come from."""
    return hashlib.sha256(repr(image.size).encode() + image.tobytes()).digest()


class ImageDataset(Dataset[tuple[Image.Image, int]], ABC):
    """Images and their labels, by index.

    Attributes:
        num_classes: Labels lie in 0..num_classes-1.
        class_names: One name per class.
        named: Whether these are names; False where they are the numbers, written out.
        image_size: Height and width in pixels where all images are square and of one size, else None.
        mean: Suggested normalisation, one value per RGB channel, for images scaled to 0..1.
        std: Likewise.
        bad_images: The images skipped so far, by index; filled by the loader, in the main process.
    """

    def __init__(
        self,
        class_names: Sequence[str],
        *,
        named: bool = True,
        image_size: int | None = None,
        mean: tuple[float, float, float] = IMAGENET_DEFAULT_MEAN,
        std: tuple[float, float, float] = IMAGENET_DEFAULT_STD,
    ) -> None:
        self.class_names = list(class_names)
        self.num_classes = self._stored_classes = len(self.class_names)
        self.named = named
        self._numbers: list[int] | None = None
        self.image_size = image_size
        self.mean = mean
        self.std = std
        self.bad_images: dict[int, BadImage] = {}

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, index: int) -> tuple[Image.Image, int]:
        """Gives the decoded image in any mode and its label as stored; raises what the decoder raises."""

    def stored_labels(self) -> npt.NDArray[np.integer] | None:
        """Labels of all samples as stored [N], where they are known without reading an image; else None."""
        return None

    def labels(self) -> npt.NDArray[np.int64]:
        """Labels of all samples [N]; -1 where an image cannot be read, if that takes reading it."""
        stored = self.stored_labels()
        if stored is None:
            found = (self.try_load(index) for index in range(len(self)))
            return np.array([-1 if isinstance(one, BadImage) else one[1] for one in found], dtype=np.int64)
        self.check_labels(stored)
        return stored.astype(np.int64) if self._numbers is None else np.array(self._numbers)[stored]

    def source(self, index: int) -> str:
        """Names where sample `index` comes from, for messages."""
        return f"sample {index}"

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """Gives sample `index` as an RGB image and its label.

        Raises:
            DataError: The image cannot be decoded, or its label is not in 0..num_classes-1.
        """
        image, label, _ = self.load(index, "fail")
        return image, label

    def number_as(self, numbers: Sequence[int], class_names: Sequence[str]) -> None:
        """Numbers the classes anew: what was class c so far is class `numbers[c]` of `class_names`."""
        self._numbers = list(numbers) if self._numbers is None else [numbers[number] for number in self._numbers]
        self.class_names = list(class_names)
        self.num_classes = len(self.class_names)

    def try_load(self, index: int) -> tuple[Image.Image, int] | BadImage:
        """Gives sample `index` as an RGB image and its label, or says why the image cannot be decoded.

        Raises:
            DataError: The label is out of range.
        """
        try:
            image, label = self.read(index)
            image = to_rgb(image)
        except MemoryError:  # which says nothing of the image
            raise
        except Exception as error:  # Pillow's plugins report damaged files with almost any
            return BadImage(index, self.source(index), explain_bad_image(error))
        self._check_label(index, label)
        return image, label if self._numbers is None else self._numbers[label]

    def load(self, index: int, on_bad_image: BadImagePolicy) -> tuple[Image.Image, int, list[BadImage]]:
        """Gives a sample, or with `on_bad_image='skip'` the next readable one, and the bad images passed on the way.

        Raises:
            DataError: An image cannot be decoded and the policy is 'fail', or none can be, or a label is out of range.
        """
        bad: list[BadImage] = []
        for step in range(len(self)):
            found = self.try_load((index + step) % len(self))
            if not isinstance(found, BadImage):
                return *found, bad
            if on_bad_image == "fail":
                raise DataError(f"{found}; replace the file, or skip it: on_bad_image=skip, or --on-bad-image skip")
            bad.append(found)
        raise DataError(f"none of the {len(self)} images can be read; the first: {bad[0]}")

    def note_bad(self, bad: Sequence[BadImage]) -> None:
        """Counts skipped images in `bad_images` and logs a warning the first time each is met."""
        for image in bad:
            if image.index not in self.bad_images:
                self.bad_images[image.index] = image
                _logger.warning("skipped a bad image: %s", image)

    def check_labels(self, labels: npt.NDArray[np.integer]) -> None:
        """Checks all labels [N] at once, so that a wrong one is found before training starts rather than in it.

        Raises:
            DataError: A label is not in 0..num_classes-1; names the first such sample.
        """
        wrong = np.flatnonzero((labels < 0) | (labels >= self._stored_classes))
        if len(wrong):
            self._check_label(int(wrong[0]), int(labels[wrong[0]]))

    def _check_label(self, index: int, label: int) -> None:
        if not 0 <= label < self._stored_classes:
            raise DataError(
                f"{self.source(index)} (index {index}) has label {label}; "
                f"expected 0..{self._stored_classes - 1} for {self._stored_classes} classes"
            )
