"""What timm gives every network beside `nn.Module`: the types that its attributes have, for whoever reads them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeGuard

from torch import Tensor, nn
from typing_extensions import TypedDict  # typing's own cannot be validated before Python 3.12

from petra_zoo.errors import UserError
from petra_zoo.reversible import Unit, units_of
from petra_zoo.strict_json import JsonObject

_OF_TIMM = ("num_classes", "num_features", "pretrained_cfg")


class ModelConfig(TypedDict, total=False):
    """timm's `pretrained_cfg`: where weights come from, what images they want, and what their classes are called."""

    architecture: str
    tag: str | None
    hf_hub_id: str | None
    url: str | None
    num_classes: int
    input_size: tuple[int, int, int]
    test_input_size: tuple[int, int, int] | None
    fixed_input_size: bool
    pool_size: tuple[int, int] | None
    crop_pct: float
    test_crop_pct: float | None
    crop_mode: str
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    first_conv: str | None
    classifier: str | None
    license: str | None
    origin_url: str | None
    label_names: Sequence[str] | Mapping[int | str, str] | None
    label_descriptions: Mapping[str, str] | None


class Feature(TypedDict):
    """One entry of timm's `feature_info`."""

    num_chs: int
    reduction: int
    module: str


class Classifier(nn.Module):
    """A network of images as timm makes it: to annotate with, never a base. `as_classifier` tells whether one is.

    Attributes:
        num_classes: of its logits; 0: it gives features.
        num_features: that its classifier reads; timm's config.json holds it.
        in_chans: channels of an image.
        pretrained_cfg: see `ModelConfig`; `default_cfg` is timm's older name of the same.
        feature_info: what each level of its features reduces the image by.
    """

    num_classes: int
    num_features: int
    in_chans: int
    pretrained_cfg: ModelConfig
    default_cfg: ModelConfig
    _model_args: JsonObject  # which timm's config.json holds
    feature_info: Sequence[Feature]
    forward_features: Callable[[Tensor], Tensor]
    forward_head: Callable[..., Tensor]
    get_classifier: Callable[[], nn.Module | tuple[nn.Module, ...]]
    reset_classifier: Callable[[int], None]
    set_grad_checkpointing: Callable[[], None]


class UnitClassifier(Classifier):
    """A `Classifier` with units, which the engine trains."""

    units: Callable[[], list[Unit]]


def as_classifier(model: nn.Module) -> Classifier:
    """The same model, known to be one of timm's kind.

    Raises:
        UserError: it is none.
    """
    if not _is_classifier(model):
        missing = ", ".join(name for name in _OF_TIMM if not hasattr(model, name))
        raise UserError(
            f"{type(model).__name__} has no {missing}: every network of timm's kind has num_classes, num_features (of "
            "what its classifier reads) and a pretrained_cfg, which build_model_with_cfg and default_cfgs give it "
            "(docs/extending.md)"
        )
    return model


def as_unit_classifier(model: nn.Module) -> UnitClassifier:
    """The same model, known to have units as well.

    Raises:
        UserError: see `as_classifier` and `petra_zoo.reversible.units_of`.
    """
    units_of(model)
    as_classifier(model)
    assert _has_units(model)
    return model


def heads_of(model: Classifier) -> list[nn.Module]:
    """What gives its logits: one module, or those of each of several heads (distilled networks have two)."""
    found = model.get_classifier()
    return list(found) if isinstance(found, tuple) else [found]


def config_of(model: nn.Module) -> ModelConfig:
    """The model's `pretrained_cfg`; empty where timm did not make it."""
    config: ModelConfig | None = getattr(model, "pretrained_cfg", None)
    return config or {}


def _is_classifier(model: nn.Module) -> TypeGuard[Classifier]:
    return all(hasattr(model, name) for name in _OF_TIMM)


def _has_units(model: nn.Module) -> TypeGuard[UnitClassifier]:
    return hasattr(model, "units")
