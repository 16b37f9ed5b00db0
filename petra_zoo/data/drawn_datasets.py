"""Data sets that need no files: `shapes`, drawn from a seed, and `synthetic`, which is noise for benchmarks.

A picture is drawn once and kept, by every process that reads it: not anew at every epoch.
"""

from abc import abstractmethod
from functools import cache

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from petra_zoo.data.image_dataset import ImageDataset, Split

_SIZE = 32
_CANVAS = 64  # drawn at twice the size and scaled down, which is Pillow's only antialiasing
_SPLIT_NUMBER = {"train": 0, "val": 1}
_KEPT_BYTES = 64 * 2**20  # of one split; what does not fit is drawn anew each time

Pixels = npt.NDArray[np.uint8]  # [H, W, 3]


@cache
def _kept(drawing: tuple[int | str, ...]) -> dict[int, Pixels]:
    """Pictures by index: the same ones whichever data set object, or run of this process, asks for them."""
    return {}


class _DrawnDataset(ImageDataset):
    """Pictures that follow from (seed, split, index) alone.

    Args:
        kind: what is drawn, with all that a picture depends on beside seed, split and index.
        split: which part.
        seed: not a run's.
        length: how many there are.
    """

    def __init__(
        self,
        class_names: list[str],
        kind: str,
        split: Split,
        seed: int,
        length: int,
        *,
        image_size: int,
        std: tuple[float, float, float],
        named: bool = True,
    ) -> None:
        super().__init__(class_names, named=named, image_size=image_size, mean=(0.5, 0.5, 0.5), std=std)
        self._key, self._length = (seed, _SPLIT_NUMBER[split]), length
        self._drawing, self._keeps = (kind, *self._key), _KEPT_BYTES // (3 * image_size**2)

    def __len__(self) -> int:
        return self._length

    def read(self, index: int) -> tuple[Image.Image, int]:
        label = index % self._stored_classes
        kept = _kept(self._drawing)
        pixels = kept.get(index)
        if pixels is None:
            pixels = self._draw(np.random.default_rng((*self._key, index)), label)
            if index < self._keeps:
                kept[index] = pixels
        return Image.fromarray(pixels), label  # which copies nothing before somebody draws into it

    def stored_labels(self) -> npt.NDArray[np.integer]:
        return np.arange(self._length) % self._stored_classes

    @abstractmethod
    def _draw(self, rng: np.random.Generator, label: int) -> Pixels:
        """One picture of a class."""


Points = npt.NDArray[np.float64]  # [N, 2], in the unit circle


def _regular(corners: int, radius: float = 1.0) -> Points:
    angles = np.arange(corners) * (2 * np.pi / corners)
    return radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _star() -> Points:
    points = _regular(10)
    points[1::2] *= 0.45
    return points


def _outline(*xy: float) -> Points:
    return np.array(xy).reshape(-1, 2)


# Each shape is an outline and, where it has one, a hole.
_SHAPES: dict[str, tuple[Points, Points | None]] = {
    "circle": (_regular(24), None),
    "ring": (_regular(24), _regular(24, 0.55)),
    "square": (_regular(4), None),
    "frame": (_regular(4), _regular(4, 0.55)),
    "triangle": (_regular(3), None),
    "cross": (_outline(-1, -.3, -.3, -.3, -.3, -1, .3, -1, .3, -.3, 1, -.3,
                       1, .3, .3, .3, .3, 1, -.3, 1, -.3, .3, -1, .3), None),
    "star": (_star(), None),
    "crescent": (_regular(24), _regular(24, 0.85) + np.array([0.45, 0.0])),
    "half disc": (_regular(24)[:13] - np.array([0.0, 0.4]), None),
    "arrow": (_outline(-1, -.25, 0, -.25, 0, -.8, 1, 0, 0, .8, 0, .25, -1, .25), None),
}  # fmt: skip


class ShapesDataset(_DrawnDataset):
    """32x32 pictures of ten shapes, unless told otherwise 4,000 to train on and 1,000 to validate.

    Place, size, rotation, stretch and colours are random; the background is textured and cluttered, the shape partly
    covered, the picture noisy. With another length the pictures are the same as far as both go.
    """

    def __init__(self, split: Split, seed: int = 0, *, lengths: tuple[int, int] = (4000, 1000)) -> None:
        length = lengths[_SPLIT_NUMBER[split]]
        super().__init__(list(_SHAPES), "shapes", split, seed, length, image_size=_SIZE, std=(0.25, 0.25, 0.25))

    def _draw(self, rng: np.random.Generator, label: int) -> Pixels:
        return _draw(rng, *_SHAPES[self.class_names[label]])


def _draw(rng: np.random.Generator, outline: Points, hole: Points | None) -> Pixels:
    # Always brighter than the ground, if not by much: without that a small network needs hundreds of updates to begin.
    background = rng.integers(20, 130, 3)
    shade = rng.integers(60, 256, 3)
    while (shade - background).sum() < 150:
        shade = rng.integers(60, 256, 3)
    colour = tuple(shade.tolist())

    texture = np.clip(background + rng.normal(0, 25, (6, 6, 3)), 0, 255).astype(np.uint8)
    image = Image.fromarray(texture).resize((_CANVAS, _CANVAS), Image.Resampling.BILINEAR)
    draw = ImageDraw.Draw(image)
    for _ in range(rng.integers(1, 4)):
        draw.line(rng.uniform(0, _CANVAS, 4).tolist(), fill=_any_colour(rng), width=int(rng.integers(1, 4)))
    for _ in range(rng.integers(1, 4)):
        # Small pieces in the shape's own colour too, so that neither colour nor area gives the class away.
        piece = _regular(int(rng.integers(3, 7))) @ _turn(rng) * rng.uniform(3, 5.5) + rng.uniform(0, _CANVAS, 2)
        draw.polygon(piece.ravel().tolist(), fill=colour if rng.random() < 0.5 else _any_colour(rng))

    mask = Image.new("L", image.size)
    mask_draw = ImageDraw.Draw(mask)
    radius, centre = rng.uniform(16, 26), rng.uniform(25, 39, 2)
    turn = radius * np.diag([1.0, rng.uniform(0.75, 1.0)]) @ _turn(rng)
    mask_draw.polygon((outline @ turn + centre).ravel().tolist(), fill=255)
    if hole is not None:
        mask_draw.polygon((hole @ turn + centre).ravel().tolist(), fill=0)
    image.paste(colour, mask=mask)

    if rng.random() < 0.6:
        cover = _regular(4) @ _turn(rng) * radius * rng.uniform(0.3, 0.55) + centre + rng.normal(0, 0.6 * radius, 2)
        draw.polygon(cover.ravel().tolist(), fill=_any_colour(rng))

    small = np.asarray(image.resize((_SIZE, _SIZE), Image.Resampling.BOX), dtype=np.float64)
    noisy = small + rng.normal(0, rng.uniform(3, 25), small.shape)
    return np.clip(noisy, 0, 255).astype(np.uint8)


def _turn(rng: np.random.Generator) -> Points:
    angle = rng.uniform(0, 2 * np.pi)
    return np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])


def _any_colour(rng: np.random.Generator) -> tuple[int, ...]:
    return tuple(rng.integers(0, 256, 3).tolist())


class SyntheticDataset(_DrawnDataset):
    """Images of noise, for benchmarks."""

    def __init__(
        self, split: Split, seed: int = 0, *, num_classes: int = 10, image_size: int = 32, length: int = 1024
    ) -> None:
        names, kind = [f"class {label}" for label in range(num_classes)], f"noise of {image_size}"
        std = (0.29, 0.29, 0.29)
        super().__init__(names, kind, split, seed, length, image_size=image_size, std=std, named=False)
        self._shape = (image_size, image_size, 3)

    def _draw(self, rng: np.random.Generator, label: int) -> Pixels:
        return rng.integers(0, 256, self._shape, dtype=np.uint8)
