"""`petra_any`: any network of timm's by name, with reversible chains of blocks (`make_reversible`).

``timm.create_model('petra_any', source='convnext_atto')`` is timm's network under its own parameters' names. A name
and the coupling in the weights is all that a saved one needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import timm
import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, get_pretrained_cfg, register_model
from torch import nn

from petra_zoo.errors import UserError
from petra_zoo.models.classifier import Feature
from petra_zoo.models.layer_arguments import Argument, Arguments
from petra_zoo.models.make_reversible import make_reversible

Configuration: TypeAlias = "str | Arguments | None"

default_cfgs = generate_default_cfgs({"petra_any.untrained": {"num_classes": 1000, "input_size": (3, 224, 224)}})
_CHAINS = (
    "coupling",
    "gain",
    "anchor_every",
    "exact",
    "exact_bits",
    "units",
    "streams",
    "shortest",
)  # of `make_reversible`

_PLACES = ("file", "hf_hub_id", "url", "state_dict")  # where an overlay may say that weights are


@register_model
def petra_any(
    pretrained: bool = False, source: str = "", pretrained_cfg: Configuration = None, **kwargs: Argument
) -> nn.Module:
    """Any network of timm's with reversible chains.

    Args:
        pretrained: with weights, the source's where none of its own are named: then at coupling 0, the source's
            function, unless another coupling is asked for.
        source: its name with timm.
        pretrained_cfg: of weights of its own (timm gives it).
        **kwargs: what the source takes, and coupling, gain, anchor_every, exact, units and streams of
            `make_reversible`.

    Raises:
        UserError: no source, or one whose chains cannot be made reversible; says why.
    """
    if not timm.is_model(source.partition(".")[0]):
        raise UserError(f"source is the name of a network of timm's, such as 'convnext_atto', not {source!r}")
    of_chains = {name: kwargs.pop(name) for name in _CHAINS if name in kwargs}
    overlay = kwargs.get("pretrained_cfg_overlay")
    elsewhere = isinstance(overlay, dict) and any(overlay.get(key) is not None for key in _PLACES)
    if own := isinstance(pretrained_cfg, dict) or elsewhere:
        configuration = pretrained_cfg if isinstance(pretrained_cfg, dict) else _configuration_of(source)
    else:
        configuration = _configuration_of(source)
        if pretrained:
            of_chains.setdefault("coupling", 0.0)

    def build(**arguments: Argument) -> nn.Module:
        model = timm.create_model(source, pretrained=pretrained and not own, **arguments)
        return make_reversible(model, **of_chains)

    if kwargs.get("features_only") and "out_indices" not in kwargs:
        with torch.device("meta"):
            features: Sequence[Feature] = getattr(timm.create_model(source), "feature_info", ())
        kwargs["out_indices"] = tuple(range(min(len(features), 5)))  # timm's default is five, whatever there are
    model: nn.Module = build_model_with_cfg(
        build,
        "petra_any",
        pretrained and own,
        pretrained_cfg=configuration,
        feature_cfg={"feature_cls": "getter"},
        **kwargs,
    )
    vars(model)["_model_args"] = {}  # the source's: timm writes those it was called with
    return model


def _configuration_of(source: str) -> dict[str, Argument]:
    found = get_pretrained_cfg(source)
    return {**(found.to_dict() if found else {}), "architecture": "petra_any"}
