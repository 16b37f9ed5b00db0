"""The last step between an image and the network, on the network's device: bytes become normalised, mixed numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from petra_zoo.data.mixing import mix
from petra_zoo.data.preprocessing import Preprocessing


class BatchTransform:
    """Normalises a batch of bytes, and mixes it where the loader has drawn how.

    A `Pipeline` takes it as `prepare`: images then travel and wait as bytes, a quarter of float32. On the CPU it gives
    the bits of torchvision's `ToTensor` and `Normalize`, then timm's `Mixup`.

    Args:
        preprocessing: whose mean and std are applied.
        device: of the images.
    """

    def __init__(self, preprocessing: Preprocessing, device: torch.device | str = "cpu") -> None:
        # Tensors, for a number's reciprocal would be multiplied with on a GPU: other bits than the CPU's.
        self._white = torch.tensor(255.0, device=device)
        self._mean, self._std = (
            torch.tensor(values, device=device).view(-1, 1, 1) for values in (preprocessing.mean, preprocessing.std)
        )

    def __call__(self, images: Tensor, numbers: Tensor | None = None) -> Tensor:
        """Images as the network takes them, float32 [B, C, H, W]; those given stay as they are.

        Args:
            images: uint8 [B, C, H, W], or float32 where they are normalised already.
            numbers: how to mix them; see `petra_zoo.data.mixing.mix`.
        """
        if not images.is_floating_point():
            images = images.float().div_(self._white).sub_(self._mean).div_(self._std)
        elif numbers is not None:
            images = images.clone()
        return images if numbers is None else mix(images, numbers)
