"""Any network with chains of blocks that keep their shape: timm's by name, and whatever else is an `nn.Module`."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import timm
from torch import Tensor, nn

from petra_zoo.converters.families import NetworkFamily, Refusal, name_of
from petra_zoo.converters.identity import exact_arguments, give_identity, rebuild_plain
from petra_zoo.converters.runs import BlockRun
from petra_zoo.converters.sequential_run import sequential_runs, use_units
from petra_zoo.errors import UserError
from petra_zoo.models.chains import find_chains
from petra_zoo.models.make_reversible import ReversibleChains, make_reversible, refusal
from petra_zoo.models.petra_any import petra_any
from petra_zoo.models.reversible_sequential import ReversibleSequential, Units

SHORTEST = 3  # blocks of a chain that is worth an inverse


class ChainFamily(NetworkFamily):
    """Networks that `make_reversible` takes; timm builds those of its own as ``petra_any``."""

    name = "chain"
    instead = (
        f"a network with {SHORTEST} blocks of one shape in a row that add to their input, such as resnet50, "
        "convnext_tiny or vit_small_patch16_224"
    )
    closest_anchors = 4
    largest_drift = 0.5

    def refusal(self, network: nn.Module, example: Tensor) -> Refusal | None:
        what = f"it is a {type(network).__name__}"
        if not any(len(list(module.children())) > 1 for module in network.modules()):
            return Refusal(what)  # a layer, and no network
        try:
            found = find_chains(network, example, shortest=2)
        except Exception as error:  # whatever a network does with an image that it does not take
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            return Refusal(what, f"it takes no images {list(example.shape)}, calibrate on its own: {reason[:80]}")
        if any(chain.longest >= SHORTEST for chain in found if not chain.obstacle):
            return None
        return Refusal(what, refusal(network, found, SHORTEST))

    def couple(self, network: nn.Module, example: Tensor) -> nn.Module:
        return make_reversible(copy.deepcopy(network), coupling=0.0, example=example)

    def use_units(self, model: nn.Module, units: Units) -> None:
        use_units(model, units)

    def owns(self, model: nn.Module) -> bool:
        return isinstance(model, ReversibleChains | ReversibleSequential)

    def runs(self, model: nn.Module) -> Sequence[BlockRun]:
        return sequential_runs(model)

    def identify(self, model: nn.Module, exact_bits: int | None) -> None:
        source = name_of(model)
        if not timm.is_model(source):
            return
        anchors = [run.anchor_every for run in self.runs(model)]
        arguments = {"source": source, **getattr(model, "_model_args", {}), **exact_arguments(exact_bits)}
        give_identity(model, petra_any.__name__, arguments | {"anchor_every": anchors if any(anchors) else None})

    def plain(self, model: nn.Module) -> nn.Module:
        arguments = dict(getattr(model, "_model_args", {}))
        source = arguments.pop("source", None)
        if source is None:
            raise UserError(f"{name_of(model)} was not made by timm: its plain network is the one it was made of")
        return rebuild_plain(model, source, arguments)
