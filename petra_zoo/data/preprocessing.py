"""What becomes of an image before a network sees it: the settings that travel with a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

from timm.data import resolve_model_data_config
from torch import nn

from petra_zoo.settings.augmentation import Interpolation


class DataConfig(TypedDict):
    """timm's words for it: what `timm.data.create_transform` takes and config.json holds."""

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: Interpolation
    crop_pct: float
    crop_mode: str


@dataclass(frozen=True)
class Preprocessing:
    """How images are prepared for a network, in evaluation.

    Attributes:
        input_size: channels, height and width of what the network sees.
        mean, std: normalisation of pixels in 0..1, one value per channel.
        interpolation: timm's word for how images are resized.
        crop_pct: the share of the resized image that is kept.
        crop_mode: timm's `center`, `squash` or `border`.
    """

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: Interpolation = "bicubic"
    crop_pct: float = 0.875
    crop_mode: str = "center"

    @classmethod
    def of(cls, model: nn.Module, *, use_test_size: bool = False) -> Preprocessing:
        """What a model's `pretrained_cfg` asks for, timm's defaults filling the gaps.

        Args:
            model: made by `timm.create_model`.
            use_test_size: go by its `test_input_size` and `test_crop_pct` where it has them.
        """
        return cls.from_timm(resolve_model_data_config(model, use_test_size=use_test_size))

    @classmethod
    def from_timm(cls, config: DataConfig) -> Preprocessing:
        """From timm's dictionary of the same settings."""
        return cls(**config)

    def as_dict(self) -> DataConfig:
        """timm's dictionary, for `create_transform` and config.json."""
        return DataConfig(
            input_size=self.input_size,
            mean=self.mean,
            std=self.std,
            interpolation=self.interpolation,
            crop_pct=self.crop_pct,
            crop_mode=self.crop_mode,
        )
