"""What happens to images, as a recipe says it; with timm's names for what timm has too."""

from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from petra_zoo.settings.policy import check_policy
from petra_zoo.settings.types import Count, Interpolation, NotNegative, Positive, Probability

T = TypeVar("T")


class Augmentation(BaseModel):
    """What happens to an image between the file and the network.

    Attributes:
        no_aug: Train on resized images without any augmentation (mixing included).
        train_crop_mode: `rrc` random resized crop, `rkrc`/`rkrr` timm's aspect-keeping ones, `pad` a random crop from
            the image padded by `crop_padding` pixels, as is usual for CIFAR.
        crop_padding: Pixels that `pad` adds on every side.
        scale, ratio: Ranges of area and of width to height of `rrc` and `rkr*`; null for timm's.
        hflip, vflip: Probabilities of turning an image around, sideways and upside down.
        color_jitter: Strength for brightness, contrast and saturation; 0 or null for none. Off where `aa` is set.
        aa: timm's AutoAugment string, such as `rand-m9-mstd0.5-inc1`.
        reprob, remode: Random erasing: probability and fill (`const`, `rand`, `pixel`).
        interpolation: How images are resized; `random` (training only) picks one per image.
        crop_pct: Validation takes this share of the resized image; null for 1 where the images have the input's
            size already, else timm's 0.875.
        mixup, cutmix: Alphas; 0 for off.
        mixup_prob, mixup_switch_prob: Share of batches mixed; of those, share given to cutmix where both are on.
        smoothing: Label smoothing.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    no_aug: bool = False
    train_crop_mode: Literal["rrc", "rkrc", "rkrr", "pad"] = "rrc"
    crop_padding: Count = 4
    scale: tuple[Positive, Positive] | None = None
    ratio: tuple[Positive, Positive] | None = None
    hflip: Probability = 0.5
    vflip: Probability = 0.0
    color_jitter: NotNegative | None = None
    aa: str | None = None
    reprob: Probability = 0.0
    remode: Literal["const", "rand", "pixel"] = "const"
    interpolation: Interpolation = "bicubic"
    crop_pct: Annotated[float, Field(gt=0, le=1)] | None = None
    mixup: NotNegative = 0.0
    cutmix: NotNegative = 0.0
    mixup_prob: Probability = 1.0
    mixup_switch_prob: Probability = 0.5
    smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0

    @field_validator("*", mode="before")
    @classmethod
    def _truth_is_no_number(cls, value: T, info: ValidationInfo) -> T | str:
        """pydantic takes true for 1, and YAML yes and on for true, off for false."""
        annotation = str(cls.model_fields[str(info.field_name)].annotation)
        if not isinstance(value, bool) or "bool" in annotation:
            return value
        if not value and "'off'" in annotation:
            return "off"
        raise ValueError("this setting is neither on nor off")

    @field_validator("aa")
    @classmethod
    def _policy_is_timms(cls, aa: str | None) -> str | None:
        if aa:
            check_policy(aa)
        return aa
