"""Data sets that need no files: `shapes`, drawn from a seed, and `synthetic`, which is noise for benchmarks."""

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from petra_zoo.data.image_dataset import ImageDataset, Split

_SIZE = 32
_CANVAS = 64  # drawn at twice the size and scaled down, which is Pillow's only antialiasing
_SPLIT_NUMBER = {"train": 0, "val": 1}

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


class ShapesDataset(ImageDataset):
    """32x32 pictures of ten shapes: 4,000 to train on, 1,000 to validate.

    Place, size, rotation, stretch and colours are random; the background is textured and cluttered, the shape partly
    covered, the picture noisy. Sample `index` is drawn from (seed, split, index) alone.
    """

    def __init__(self, split: Split, seed: int = 0) -> None:
        super().__init__(list(_SHAPES), image_size=_SIZE, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
        self._length = 4000 if split == "train" else 1000
        self._key = (seed, _SPLIT_NUMBER[split])

    def __len__(self) -> int:
        return self._length

    def read(self, index: int) -> tuple[Image.Image, int]:
        label = index % self._stored_classes
        rng = np.random.default_rng((*self._key, index))
        return _draw(rng, *_SHAPES[self.class_names[label]]), label


def _draw(rng: np.random.Generator, outline: Points, hole: Points | None) -> Image.Image:
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
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))


def _turn(rng: np.random.Generator) -> Points:
    angle = rng.uniform(0, 2 * np.pi)
    return np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])


def _any_colour(rng: np.random.Generator) -> tuple[int, ...]:
    return tuple(rng.integers(0, 256, 3).tolist())


class SyntheticDataset(ImageDataset):
    """1,024 images of noise, for benchmarks: sample `index` is drawn from (seed, split, index) alone."""

    def __init__(self, split: Split, seed: int = 0, *, num_classes: int = 10, image_size: int = 32) -> None:
        names = [f"class {label}" for label in range(num_classes)]
        super().__init__(names, named=False, image_size=image_size, mean=(0.5, 0.5, 0.5), std=(0.29, 0.29, 0.29))
        self._shape = (image_size, image_size, 3)
        self._key = (seed, _SPLIT_NUMBER[split])

    def __len__(self) -> int:
        return 1024

    def read(self, index: int) -> tuple[Image.Image, int]:
        rng = np.random.default_rng((*self._key, index))
        return Image.fromarray(rng.integers(0, 256, self._shape, dtype=np.uint8)), index % self._stored_classes
