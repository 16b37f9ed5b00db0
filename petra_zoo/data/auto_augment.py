"""timm's auto-augmentation, mended where it fails."""

from collections.abc import Callable, Sequence

from PIL import Image
from timm.data import auto_augment


def mend_posterize(transform: Callable[[Image.Image], Image.Image]) -> None:
    """Lets the operations in one of timm's auto-augmentation transforms keep no bit at all, in place.

    timm's levels go down to that, and below where `mmax` is above 10: the image becomes black, as older versions of
    Pillow made it. Newer ones raise.
    """
    found = getattr(transform, "ops", None) or [op for steps in getattr(transform, "policy", ()) for op in steps]
    for op in found:
        if op.aug_fn is auto_augment.posterize:
            op.aug_fn = _posterize


def _posterize(image: Image.Image, bits_to_keep: int, **kwargs: int | Sequence[int]) -> Image.Image:
    if bits_to_keep < 1:
        return image.point([0] * 256 * len(image.getbands()))
    return auto_augment.posterize(image, bits_to_keep, **kwargs)
