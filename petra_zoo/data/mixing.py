"""Mixup and cutmix as a few numbers of a batch: drawn where it is loaded, applied where the network is.

timm's `Mixup` draws the numbers, so that its settings mean what they mean there; what is done with them is the same
arithmetic, by operations alone that a GPU can do again at any time: nothing is read back, no shape depends on a value.
"""

from __future__ import annotations

import torch
from timm.data.mixup import Mixup, cutmix_bbox_and_lam, mixup_target
from torch import Tensor

from petra_zoo.settings.augmentation import Augmentation


class Mixer:
    """Draws how batches are mixed, from the global generator of NumPy, and mixes their labels.

    Args:
        settings: what to do; without mixup and cutmix labels are smoothed and no numbers drawn.
        num_classes: of the labels.
    """

    def __init__(self, settings: Augmentation, num_classes: int) -> None:
        self.smoothing, self.num_classes = settings.smoothing, num_classes
        self._numbers: _Numbers | None = None
        if settings.mixup or settings.cutmix:
            self._numbers = _Numbers(
                settings.mixup,
                settings.cutmix,
                prob=settings.mixup_prob,
                switch_prob=settings.mixup_switch_prob,
            )

    @property
    def mixes(self) -> bool:
        """Whether images are mixed, and not labels alone smoothed."""
        return self._numbers is not None

    def draw(self, labels: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
        """The numbers of a batch and its labels.

        Args:
            labels: int64 [B].
            height, width: of the images.

        Returns:
            What `mix` takes, and the labels as probabilities, float32 [B, classes].
        """
        soft = self.smooth(labels)
        assert self._numbers is not None
        numbers, share = self._numbers.draw(height, width)
        even = _paired(labels)
        soft[:even] = mixup_target(labels[:even], self.num_classes, share, self.smoothing)
        return numbers, soft

    def smooth(self, labels: Tensor) -> Tensor:
        """Labels that are not mixed as probabilities, float32 [B, classes]."""
        return mixup_target(labels, self.num_classes, 1.0, self.smoothing)


def mix(images: Tensor, numbers: Tensor) -> Tensor:
    """Mixes the first image with the last, the second with the last but one, and so on, in place.

    Args:
        images: float [B, C, H, W]; timm mixes pairs and refuses an odd batch: the last image of one stays as it is.
        numbers: float32 [6]: a box (top, bottom, left, right, in pixels, the ends excluded) and, inside of it, the
            shares of an image itself and of its partner. Outside it is itself. On the images' device.
    """
    top, bottom, left, right, own, other = numbers.unbind()
    rows = torch.arange(images.shape[2], device=images.device)
    columns = torch.arange(images.shape[3], device=images.device)
    inside = ((rows >= top) & (rows < bottom)).unsqueeze(1) & ((columns >= left) & (columns < right))
    pairs = images[: _paired(images)]
    partners = pairs.flip(0).mul_(torch.where(inside, other, 0.0))
    pairs.mul_(torch.where(inside, own, 1.0)).add_(partners)
    return images


def _paired(batch: Tensor) -> int:
    return len(batch) // 2 * 2


class _Numbers(Mixup):
    """timm's draws for a whole batch, without the images that it would mix at once."""

    def draw(self, height: int, width: int) -> tuple[Tensor, float]:
        """What `mix` takes, and an image's own share of its pixels."""
        share, cuts = self._params_per_batch()
        if share == 1.0:
            return torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0, 0.0]), 1.0
        if not cuts:
            return torch.tensor([0.0, height, 0.0, width, share, 1.0 - share]), share
        box, share = cutmix_bbox_and_lam((height, width), share, correct_lam=self.correct_lam)
        return torch.tensor([*map(float, box), 0.0, 1.0]), share
