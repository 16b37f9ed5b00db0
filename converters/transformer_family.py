"""timm's vision transformers: their blocks are one run, from the first to the last, and nothing is re-estimated."""

from __future__ import annotations

from collections.abc import Sequence

import timm
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from petra_zoo.converters.families import NetworkFamily, Refusal, name_of
from petra_zoo.converters.identity import exact_arguments, give_identity, rebuild_plain
from petra_zoo.converters.runs import BlockRun
from petra_zoo.converters.sequential_run import sequential_runs, use_units
from petra_zoo.models import PetraBeit, PetraEva, PetraVit, PetraVitDistilled
from petra_zoo.models.reversible_sequential import Units
from petra_zoo.models.timm_twins import PREFIX
from petra_zoo.models.transformer import ReversibleTransformer

_TWINS: dict[type[nn.Module], type[ReversibleTransformer]] = {
    VisionTransformer: PetraVit,
    VisionTransformerDistilled: PetraVitDistilled,
    Eva: PetraEva,
    Beit: PetraBeit,
}


class TransformerFamily(NetworkFamily):
    """Reversible transformers under ``petra_`` and timm's name: `ReversibleTransformer`."""

    name = "transformer"
    instead = "a vision transformer of timm's instead, such as vit_small_patch16_224"
    part = "network"
    closest_anchors = 4
    largest_drift = 0.5

    def refusal(self, network: nn.Module, example: Tensor) -> Refusal | None:
        return None if type(network) in _TWINS else Refusal(f"it is a {type(network).__name__}")

    def couple(self, network: nn.Module, example: Tensor) -> nn.Module:
        model = _TWINS[type(network)].from_timm(network)
        assert isinstance(model, nn.Module)
        return model

    def use_units(self, model: nn.Module, units: Units) -> None:
        use_units(model, units)

    def owns(self, model: nn.Module) -> bool:
        return isinstance(model, ReversibleTransformer)

    def runs(self, model: nn.Module) -> Sequence[BlockRun]:
        return sequential_runs(model)

    def identify(self, model: nn.Module, exact_bits: int | None) -> None:
        architecture = PREFIX + name_of(model)
        if timm.is_model(architecture):
            (run,) = self.runs(model)
            arguments = {**getattr(model, "_model_args", {}), **exact_arguments(exact_bits)}
            give_identity(model, architecture, arguments | {"anchor_every": run.anchor_every or None})

    def plain(self, model: nn.Module) -> nn.Module:
        return rebuild_plain(model, name_of(model).removeprefix(PREFIX), getattr(model, "_model_args", {}))
