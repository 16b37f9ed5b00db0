"""Pictures in rows and columns with a few words below each: for a person to look at."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from petra_zoo.data.image_dataset import ImageDataset
from petra_zoo.data.loader import Reading, create_loader
from petra_zoo.data.preprocessing import Preprocessing
from petra_zoo.errors import UserError
from petra_zoo.files import check_writable
from petra_zoo.settings.augmentation import Augmentation

_SIDE, _MARGIN, _LINE = 128, 8, 15  # pixels: of a picture at most, around it, of a line of words
_COLUMNS = 8
_WORTH_NAMING = 0.05  # of a mixed label; below, it is label smoothing


@dataclass(frozen=True)
class Tile:
    """A picture, and the lines below it; the colour is that of the words."""

    image: Image.Image
    lines: Sequence[str]
    color: str = "black"


def contact_sheet(tiles: Sequence[Tile], columns: int = _COLUMNS) -> Image.Image:
    """Draws the tiles in order, row by row; small pictures are enlarged by whole numbers, their pixels kept."""
    font = _font()
    pictures = [_fitted(tile.image) for tile in tiles]
    words = [[part for line in tile.lines for part in _broken(line, font)] for tile in tiles]
    columns = max(1, min(columns, len(tiles)))
    rows = [range(at, min(at + columns, len(tiles))) for at in range(0, len(tiles), columns)]
    heights = [
        max(pictures[i].height for i in row) + _LINE * max(len(words[i]) for i in row) + 2 * _MARGIN for row in rows
    ]
    sheet = Image.new("RGB", (columns * (_SIDE + _MARGIN) + _MARGIN, sum(heights) + _MARGIN), "white")
    draw, top = ImageDraw.Draw(sheet), _MARGIN
    for row, height in zip(rows, heights, strict=True):
        tallest = max(pictures[i].height for i in row)
        for column, i in enumerate(row):
            left = _MARGIN + column * (_SIDE + _MARGIN)
            sheet.paste(pictures[i], (left + (_SIDE - pictures[i].width) // 2, top + tallest - pictures[i].height))
            for number, line in enumerate(words[i]):
                at = (left + _SIDE / 2, top + tallest + number * _LINE + _LINE / 2 + 2)
                draw.text(at, line, fill=tiles[i].color, font=font, anchor="mm")
        top += height
    return sheet


def sample_sheet(
    data: ImageDataset,
    preprocessing: Preprocessing,
    augmentation: Augmentation,
    *,
    count: int = 32,
    seed: int = 0,
    balanced: bool = False,
) -> Image.Image:
    """The first images of an epoch as a network sees them, with what their labels say: augmented, mixed, in its size.

    The next one is in the place of an image that cannot be read.

    Args:
        data: to train on.
        preprocessing: what the network wants of an image.
        augmentation: what happens to it before.
        count: how many images; fewer where there are fewer.
        seed: of the run.
        balanced: see `create_loader`.

    Raises:
        DataError: no image can be read.
    """
    loader = create_loader(
        data,
        preprocessing,
        batch_size=min(count, len(data)),
        augmentation=augmentation,
        seed=seed,
        balanced=balanced,
        reading=Reading(on_bad_image="skip"),
    )
    images, labels = next(iter(loader))
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (preprocessing.mean, preprocessing.std))
    pixels = (images * std + mean).clamp_(0.0, 1.0)
    names = data.class_names
    tiles = [Tile(to_pil_image(x), _said(label, names)) for x, label in zip(pixels, labels, strict=True)]
    return contact_sheet(tiles)


def check_picture(path: Path) -> None:
    """Refuses a picture that could not be written, before the work whose result it shows.

    Raises:
        UserError: there is no such format, or the place cannot be written.
    """
    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise UserError(f"cannot write the picture {path}: expected a name that ends in .png or .jpg")
    check_writable(path)


def save_picture(picture: Image.Image, path: Path) -> None:
    """Writes a picture in the format that its name says.

    Raises:
        UserError: there is no such format, or the place cannot be written.
    """
    try:
        picture.save(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"cannot write the picture {path}: {reason}") from error


def _font() -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    """One with as many letters as can be had: Pillow's own has ASCII's alone, and names of classes have others."""
    with suppress(ImportError, OSError):
        import matplotlib

        return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), 11)
    return ImageFont.load_default(12)


def _said(label: Tensor, names: Sequence[str]) -> list[str]:
    """A class, or of a mixed label all that are in it, the largest first."""
    if label.ndim == 0:
        return [names[int(label)]]
    shares, places = label.sort(descending=True)
    mixed = [(share, place) for share, place in zip(shares.tolist(), places.tolist(), strict=True)]
    told = [(share, place) for share, place in mixed[:3] if share >= _WORTH_NAMING]
    return [names[told[0][1]]] if len(told) == 1 else [f"{share:.0%} {names[place]}" for share, place in told]


def _fitted(image: Image.Image) -> Image.Image:
    larger = _SIDE // max(image.size)
    if larger > 1:
        return image.resize((image.width * larger, image.height * larger), Image.Resampling.NEAREST)
    smaller = image.copy()
    smaller.thumbnail((_SIDE, _SIDE))
    return smaller


def _broken(line: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> list[str]:
    """The line in parts that fit below a picture: names are never cut off."""
    parts = [""]
    for letter in line:
        if font.getlength(parts[-1] + letter) > _SIDE:
            parts.append("")
        parts[-1] += letter
    return [part.strip() for part in parts]
