"""Any network whose blocks form chains, with reversible chains."""

from __future__ import annotations

import copyreg
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import timm
import torch
from torch import Tensor, nn

from petra_zoo.errors import UserError
from petra_zoo.models.chains import Chain, Example, example_of, find_chains, goes_through_blocks, on_meta
from petra_zoo.models.coupled_layer import CoupledLayer
from petra_zoo.models.grids import choose_grids
from petra_zoo.models.layer_parts import Enter, first_stream, unchanged
from petra_zoo.models.memory_modes import Memory, MemoryModes
from petra_zoo.models.reversible_sequential import ReversibleSequential, Units
from petra_zoo.models.shared_arguments import Given
from petra_zoo.models.spine import spine_of
from petra_zoo.reversible import FunctionUnit, StreamKind, Streams, Unit


def make_reversible(
    model: nn.Module,
    coupling: float | None = None,
    gain: float | None = None,
    anchor_every: int | Sequence[int] = 0,
    exact: bool = False,
    units: Units = "auto",
    streams: StreamKind = "auto",
    *,
    exact_bits: int = 12,
    shortest: int = 3,
    example: Example | None = None,
) -> nn.Module:
    """Makes the chains of blocks of a network reversible, in place: training stores no activations between the blocks.

    Chains are found by watching the network (`petra_zoo.models.chains`); each one's container is replaced by a
    `ReversibleSequential`, and all else stays: classes, parameters, their names. At coupling 0 the network computes
    what it did, to the bit. Above 0 it is another network: near the trained one for small couplings, and one to be
    trained at 1. The converter (`petra-zoo convert`) chooses the coupling by what a trained network loses.

    Args:
        model: any network; those of timm say themselves what they take.
        coupling: g of all chains; None: 1, and whatever a checkpoint says.
        gain: s of all chains; None: 1 + g below coupling 1, which keeps the effect of trained blocks, and 1 at it.
        anchor_every: keep the streams every so many blocks of a run, or one number per chain; 0: never.
        exact: reconstruct to the bit.
        units: see `ReversibleSequential`.
        streams: likewise.
        exact_bits: the grid of `exact` (see `ReversibleSequential`).
        shortest: a network without a run of so many blocks is refused; beside one, runs of two are taken too.
        example: a tensor [1, ...], or several, that the network can be called with; not needed for timm's.

    Returns:
        The network: the same object, or a `ReversibleSequential` where it was nothing but a Sequential of blocks. It
        is a `ReversibleChains` as well as what it was.

    Raises:
        UserError: it has no chain that could be made reversible, or is reversible already; says what was found.
    """
    if any(isinstance(module, ReversibleSequential | CoupledLayer) for module in model.modules()):
        raise UserError(f"{type(model).__name__} is reversible already: set_coupling() and set_memory() change it")
    found = find_chains(model, example, shortest=2)
    chains = [chain for chain in found if not chain.obstacle]
    if max((chain.longest for chain in chains), default=0) < shortest:
        raise UserError(refusal(model, found, shortest))
    if gain is None and coupling is not None and 0.0 < coupling < 1.0:
        gain = 1.0 + coupling
    passed_by = goes_through_blocks(model, [chain.path for chain in chains], example)
    if callable(switch := getattr(model, "set_grad_checkpointing", None)):
        switch(False)  # it would call the blocks itself
    for chain, apart in zip(chains, _one_per_chain(anchor_every, len(chains)), strict=True):
        old = model.get_submodule(chain.path)
        new = ReversibleSequential(
            {name: block for name, block in old._modules.items() if block is not None},
            coupling=coupling,
            gain=gain,
            anchor_every=apart,
            exact=exact,
            exact_bits=exact_bits,
            streams=streams,
            units=units,
            opening=[old.get_submodule(name) for name in chain.opening],
        ).train(old.training)
        if not chain.path:
            return new
        parent, _, name = chain.path.rpartition(".")
        setattr(model.get_submodule(parent), name, new)
    object.__setattr__(model, "__class__", _reversible_class(type(model), passed_by))
    assert isinstance(model, ReversibleChains)
    model._spine = _spine(model, [chain.path for chain in chains], example)
    return model


def _one_per_chain(anchor_every: int | Sequence[int], chains: int) -> list[int]:
    values = [anchor_every] * chains if isinstance(anchor_every, int) else list(anchor_every)
    if len(values) != chains:
        raise UserError(f"anchor_every is one number or {chains}, one per chain; got {len(values)}")
    return values


class ReversibleChains(MemoryModes):
    """Mixin of the networks that `make_reversible` gives."""

    _spine: Sequence[str] = ("",)

    @torch.jit.unused
    def named_layers(self) -> dict[str, ReversibleSequential]:
        """The reversible containers by name."""
        assert isinstance(self, nn.Module)
        return {name: module for name, module in self.named_modules() if isinstance(module, ReversibleSequential)}

    @torch.jit.unused
    def coupled_layers(self) -> list[ReversibleSequential]:
        """The reversible containers."""
        return list(self.named_layers().values())

    @torch.jit.ignore
    def set_memory(self, memory: Memory) -> None:
        super().set_memory(memory)
        for layer in self.coupled_layers():
            layer.memory = memory

    @torch.jit.unused
    def _use_streams(self, streams: StreamKind) -> None:
        for layer in self.coupled_layers():
            layer.set_streams(streams)

    @torch.jit.unused
    def set_coupling(self, coupling: float) -> None:
        """Sets g of every chain."""
        for layer in self.coupled_layers():
            layer.set_coupling(coupling)
        self._is_built_with("coupling", None)  # the state dict has it

    @torch.jit.unused
    def set_gain(self, gain: float) -> None:
        """Sets s of every chain."""
        for layer in self.coupled_layers():
            layer.set_gain(gain)
        self._is_built_with("gain", None)

    @torch.jit.unused
    def set_anchors(self, anchor_every: int | Sequence[int]) -> None:
        """Keeps the streams every so many blocks, of all chains or of each, in copies that are saved too; 0: never."""
        layers = self.coupled_layers()
        for layer, apart in zip(layers, _one_per_chain(anchor_every, len(layers)), strict=True):
            layer.anchor_every = apart
        self._is_built_with("anchor_every", anchor_every)

    @torch.jit.unused
    def choose_grids(self, images: Tensor, headroom: float = 4.0) -> None:
        """Sets the grids of fixed16 streams by what the streams are for images [B, C, H, W]; see `choose_grids`."""
        assert isinstance(self, nn.Module)
        choose_grids(self, self.coupled_layers(), images, headroom)

    @torch.jit.unused
    def check_streams(self) -> None:
        """Reads what streams on a grid have seen of its range, and waits for the device.

        Raises:
            UserError: a value was beyond it since the last time.
        """
        for layer in self.coupled_layers():
            layer.check_streams()

    @torch.jit.unused
    def units(self) -> list[Unit]:
        """The units of the network: the blocks of its chains, and the modules between them.

        A network that computes something between its modules is one unit, in which its chains save their memory.
        """
        assert isinstance(self, nn.Module)
        layers = self.named_layers()
        units: list[Unit] = []
        if not layers.keys() <= set(self._spine):
            units = [FunctionUnit("network", lambda x: (self(x),), {"network": self})]
        else:
            leave: Enter = first_stream
            for path, following in zip_longest(self._spine, self._spine[1:]):
                behind = layers.get(following) if following else None
                if path in layers:
                    of_layer, leave = layers[path].units(path, leave)
                    units += of_layer
                else:
                    module = self.get_submodule(path)
                    function = _Between(module, leave, behind.enter if behind else unchanged)
                    units.append(FunctionUnit(path, function, {path: module}, behind.streams if behind else None))
                    leave = first_stream
            if leave is not first_stream:
                units.append(FunctionUnit("output", lambda *streams: (leave(*streams),), {}))
        for unit in units:
            unit.outside = (self, *layers.values())
        return units


@dataclass(frozen=True)
class _Between:
    """A module that knows no streams, behind something and in front of something."""

    module: nn.Module
    enter: Enter
    leave: Callable[[Tensor], Tensor]

    def __call__(self, *streams: Tensor) -> Streams:
        h = self.enter(*streams)
        return (self.leave(self.module(h.clone() if h is streams[0] else h)),)  # it may write into its argument


class _Made(type):
    """The class of classes that are made here, so that copies and pickles make them again."""


_FEATURES, _RESET = "forward_intermediates", "reset_classifier"
_classes: dict[tuple[type[nn.Module], bool], _Made] = {}


def _reversible_class(source: type[nn.Module], passed_by: bool) -> _Made:
    """The class of networks of a class that `make_reversible` gives; always the same one.

    Args:
        source: the class.
        passed_by: whether its `forward_intermediates` calls the blocks, where the coupling does not reach it.
    """
    if (source, passed_by) not in _classes:
        own = {_FEATURES: torch.jit.ignore(_checked_features(source)), "__module__": source.__module__}
        if not passed_by:
            del own[_FEATURES]
        if hasattr(source, _RESET):
            own[_RESET] = torch.jit.ignore(_watched_reset(source))
        bases = (ReversibleChains, source)
        _classes[source, passed_by] = _Made(f"Reversible{source.__name__}", bases, own)
    return _classes[source, passed_by]


def _checked_features(source: type[nn.Module]) -> Callable[..., Given]:
    """The `forward_intermediates` of a class, for networks without a coupling."""
    inherited: Callable[..., Given] | None = getattr(source, _FEATURES, None)

    def forward_intermediates(self: ReversibleChains, *args: Given, **kwargs: Given) -> Given:
        if inherited is None or any(layer.g() > 0.0 for layer in self.coupled_layers()):
            raise NotImplementedError(
                f"{_FEATURES} of {source.__name__} calls the blocks one by one, where the coupling does not reach: "
                "ask their container, model.blocks.features(x, indices)"
            )
        return inherited(self, *args, **kwargs)

    return forward_intermediates


def _watched_reset(source: type[nn.Module]) -> Callable[..., None]:
    """The `reset_classifier` of a class: with another pooling a network may be made of other modules."""
    inherited: Callable[..., None] = getattr(source, _RESET)

    @functools.wraps(inherited)
    def reset_classifier(self: ReversibleChains, *args: Given, **kwargs: Given) -> None:
        inherited(self, *args, **kwargs)
        assert isinstance(self, nn.Module)
        try:
            self._spine = _spine(self, list(self.named_layers()), None)
        except UserError:  # nobody knows what to call it with: it is one unit
            self._spine = ("",)

    return reset_classifier


copyreg.pickle(_Made, lambda made: (_reversible_class, next(key for key, kind in _classes.items() if kind is made)))


def _spine(model: nn.Module, layers: Sequence[str], example: Example | None) -> list[str]:
    """The modules that the network is made of in training and in evaluation alike; else [""]."""
    found = []
    skeleton = on_meta(model)
    inputs = [torch.cat([x, x]).to("meta") for x in example_of(model, example)]  # a norm may ask for two
    for training in (True, False):
        try:
            found.append(spine_of(skeleton.train(training), inputs, layers))
        except (NotImplementedError, RuntimeError, ValueError):
            return [""]
    return found[0] if found[0] == found[1] else [""]


def refusal(model: nn.Module, found: Sequence[Chain], shortest: int) -> str:
    """Why a network was not made reversible, in a line.

    Args:
        model: the network.
        found: its chains, obstacles and all.
        shortest: what counts as one.
    """
    name = type(model).__name__
    refused = [chain for chain in found if chain.obstacle and chain.longest >= shortest]
    if not refused:
        return (
            f"{name} has no {shortest} blocks one after the other that keep their input's shape and add to it: what "
            "widens it (DenseNet) or replaces it (VGG) has nothing to reverse"
        )
    chain = max(refused, key=lambda chain: chain.longest)
    message = f"{name}: {chain.longest} {' and '.join(chain.kinds)} in {chain.path}: {chain.obstacle}"
    if not chain.one_by_one:
        return message
    architecture = str((getattr(model, "pretrained_cfg", None) or {}).get("architecture"))
    if timm.is_model(f"petra_{architecture}"):
        return f"{message}; timm.create_model('petra_{architecture}') is this network with its own forward"
    return f"{message}; in its forward, replace that loop by ReversibleSequential(self.{chain.path})(x, *shared)"
