"""What the zoo's vision transformers have beside timm's: one run of coupled blocks, from the first to the last.

A transformer keeps one width, so its `blocks` are one `ReversibleSequential`: the stem in front of it makes tokens of
images, the head behind it reads the merged streams.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Optional, Protocol, Self

import torch
from timm.layers import PatchEmbed
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from petra_zoo.errors import UserError
from petra_zoo.models.grids import choose_grids
from petra_zoo.models.layer_arguments import Argument
from petra_zoo.models.layer_parts import first_stream
from petra_zoo.models.memory_modes import Memory, MemoryModes
from petra_zoo.models.reversible_sequential import ReversibleSequential, Units
from petra_zoo.reversible import FunctionUnit, StreamKind, Streams, Unit

Shared = Callable[[], tuple[Argument, ...]]  # what every block takes behind its tokens


@dataclass(frozen=True)
class Portion:
    """What stands in front of the blocks or behind them: a function, and names of the modules that it calls."""

    function: Callable[[Tensor], Argument]
    modules: Sequence[str]


@dataclass(frozen=True)
class Intermediates:
    """What timm's forward_intermediates is asked for; see there."""

    indices: int | list[int] | None
    return_prefix_tokens: bool
    norm: bool
    stop_early: bool
    output_fmt: str
    intermediates_only: bool
    output_dict: bool = False


class ReversibleTransformer(MemoryModes, nn.Module):
    """Base of vision transformers, in front of timm's class.

    Args:
        *args: the arguments of timm's class.
        coupling: g; None: 1, and whatever a checkpoint says (pretrained weights of timm's: 1/4, exact 1/16).
        gain: s; None: 1, and whatever a checkpoint says (pretrained weights of timm's: 1 + g).
        anchor_every: keep the streams every so many blocks; 0: no more often than their inverse needs it.
        exact: reconstruct to the bit, on a grid of 2**-exact_bits.
        exact_bits: streams must stay below 2**(24 - exact_bits) in float32.
        units: ``'block'``, also ``'auto'``: a unit is a whole block; ``'branch'``: attention and MLP are, in turn.
        chunks: in how many parts such a branch is evaluated, the MLP by tokens, the attention by heads.
        streams: what carries the streams, see `set_streams`.
        **kwargs: the arguments of timm's class; unknown ones raise TypeError.
    """

    if TYPE_CHECKING:
        blocks: Argument  # a Sequential to some of timm's classes, a ModuleList to others
        norm: nn.Module
        patch_embed: PatchEmbed
        num_prefix_tokens: int

    def __init__(
        self,
        *args: Argument,
        coupling: float | None = None,
        gain: float | None = None,
        anchor_every: int = 0,
        exact: bool = False,
        exact_bits: int = 12,
        units: Units = "auto",
        chunks: int = 1,
        streams: StreamKind = "auto",
        **kwargs: Argument,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._couple(coupling, gain, anchor_every, exact_bits if exact else None, units, streams, chunks)

    @classmethod
    def from_timm(cls, source: nn.Module) -> Self:
        """A coupled copy of one of timm's transformers; with its coupling, 0, it computes the same to the bit.

        Raises:
            UserError: the source is of another class.
        """
        timms = (kind for kind in cls.__mro__ if issubclass(kind, nn.Module) and not issubclass(kind, MemoryModes))
        if type(source) is not (of := next(timms)):
            raise UserError(f"{cls.__name__} is a {of.__name__} with coupled blocks, and no {type(source).__name__}")
        model = copy.deepcopy(source)
        model.__class__ = cls
        assert isinstance(model, cls)
        model._couple(0.0, None, 0, None, "auto", "auto")
        return model

    @torch.jit.unused
    def _container(self) -> type[ReversibleSequential]:
        """Of the blocks."""
        return ReversibleSequential

    @torch.jit.unused
    def _couple(
        self,
        coupling: float | None,
        gain: float | None,
        anchor_every: int,
        exact_bits: int | None,
        units: Units,
        streams: StreamKind,
        chunks: int = 1,
    ) -> None:
        blocks = self.get_submodule("blocks")
        assert isinstance(blocks, nn.Sequential | nn.ModuleList)
        coupled = self._container()(
            blocks,
            coupling=coupling,
            gain=gain,
            anchor_every=anchor_every,
            exact=exact_bits is not None,
            exact_bits=exact_bits or 12,
            streams=streams,
            units=units,
            chunks=chunks,
        )
        self.add_module("blocks", coupled.train(blocks.training))

    # -- the run --------------------------------------------------------------------------------------------------

    @torch.jit.unused
    def coupled_blocks(self) -> ReversibleSequential:
        """The blocks, as what they are."""
        blocks = self.get_submodule("blocks")
        assert isinstance(blocks, ReversibleSequential)
        return blocks

    @torch.jit.unused
    def named_layers(self) -> dict[str, ReversibleSequential]:
        """The runs of coupled blocks by name: here one."""
        return {"blocks": self.coupled_blocks()}

    @torch.jit.unused
    def coupled_layers(self) -> list[ReversibleSequential]:
        """The runs of coupled blocks."""
        return list(self.named_layers().values())

    @torch.jit.unused
    def set_coupling(self, coupling: float) -> None:
        """Sets g, a multiple of 1/256 in [0, 1]; the gain stays as it is."""
        self.coupled_blocks().set_coupling(coupling)
        self._is_built_with("coupling", None)  # the state dict has it

    @torch.jit.unused
    def set_gain(self, gain: float) -> None:
        """Sets s, which scales the branches of all blocks but the first."""
        self.coupled_blocks().set_gain(gain)
        self._is_built_with("gain", None)

    @torch.jit.unused
    def set_anchors(self, anchors: Sequence[int]) -> None:
        """Keeps the streams every so many blocks of each run, in this network and in copies that are saved."""
        for layer, anchor_every in zip(self.coupled_layers(), anchors, strict=True):
            layer.anchor_every = anchor_every
        self._is_built_with("anchor_every", anchors[0] or None)

    @torch.jit.ignore
    def set_memory(self, memory: Memory) -> None:
        super().set_memory(memory)
        self.coupled_blocks().memory = memory

    @torch.jit.unused
    def _use_streams(self, streams: StreamKind) -> None:
        self.coupled_blocks().set_streams(streams)

    @torch.jit.unused
    def choose_grids(self, images: Tensor, headroom: float = 4.0) -> None:
        """Sets the grids of fixed16 streams by what the streams are for images [B, C, H, W]; see `choose_grids`."""
        assert isinstance(self, nn.Module)
        choose_grids(self, self.coupled_layers(), images, headroom)

    @torch.jit.unused
    def check_streams(self) -> None:
        """Reads what streams on a grid have seen of its range, and waits for the device; pipelines do it by themselves.

        Raises:
            UserError: a value was beyond it since the last time.
        """
        self.coupled_blocks().check_streams()

    @torch.jit.unused
    def _reset_couplings(self) -> None:
        blocks = self.get_submodule("blocks")
        if isinstance(blocks, ReversibleSequential):  # timm initialises before there are any
            blocks.reset_coupling()

    # -- units ----------------------------------------------------------------------------------------------------

    @torch.jit.unused
    def _list_units(
        self,
        stem: Portion,
        head: Portion,
        shared: Shared = tuple,
        reads: Mapping[str, nn.Module] | None = None,
    ) -> list[Unit]:
        """Stem, blocks and head.

        Args:
            stem: from images to tokens; the network's own parameters, tokens and position embeddings, are its too.
            head: from what the last norm gives to logits.
            shared: what every block takes behind its tokens, anew at every evaluation.
            reads: modules that it reads.
        """
        self._check_units()
        blocks = self.coupled_blocks()

        def first(x: Tensor) -> Streams:
            return (blocks.enter(stem.function(x)),)

        def last(*streams: Tensor) -> Streams:
            logits = head.function(self.norm(leave(*streams)))
            return logits if isinstance(logits, tuple) else (logits,)

        in_front = {"own": OwnParameters(self), **self._named(stem.modules)}
        of_blocks, leave = blocks.units("blocks", first_stream, shared, reads)
        units: list[Unit] = [
            FunctionUnit("stem", first, in_front, blocks.streams),
            *of_blocks,
            FunctionUnit("head", last, self._named(["norm", *head.modules])),
        ]
        for unit in units:
            unit.outside = (self, blocks)
        return units

    @torch.jit.unused
    def _named(self, names: Sequence[str]) -> dict[str, nn.Module]:
        return {name: module for name in names if (module := getattr(self, name, None)) is not None}

    @torch.jit.unused
    def _by_units(self, x: Tensor) -> Argument:
        outputs = self._run_units(self._all_units(), x)
        return outputs[0] if len(outputs) == 1 else outputs  # two heads, in distilled training

    # -- features -------------------------------------------------------------------------------------------------

    @torch.jit.unused
    def _intermediates(
        self,
        tokens: Tensor,
        images: Tensor,
        options: Intermediates,
        *shared: Argument,
    ) -> Argument:
        """timm's forward_intermediates behind the stem; what is taken behind a block are its merged streams.

        Args:
            tokens: [B, N, C].
            images: [B, C, H, W], which they are of.
            options: what is taken, and how it is given.
            *shared: what every block takes behind its tokens.
        """
        blocks = self.coupled_blocks()
        take, last = feature_take_indices(len(blocks), options.indices)
        if options.stop_early:
            blocks = blocks[: last + 1]
        *found, x = blocks.features(tokens, take, *shared)
        return as_asked(self, found, x, images, options)


class GivesTokens(Protocol):
    """What of a network shapes its features: the last norm, the grid of its patches, and tokens in front of those."""

    @property
    def norm(self) -> Callable[[Tensor], Tensor]: ...

    @property
    def patch_embed(self) -> PatchEmbed: ...

    @property
    def num_prefix_tokens(self) -> int: ...


def as_asked(model: GivesTokens, found: list[Tensor], x: Tensor, images: Tensor, options: Intermediates) -> Argument:
    """Features as timm's forward_intermediates gives them.

    Args:
        model: whose features they are.
        found: behind the blocks asked for, [B, N, C].
        x: behind the last one.
        images: [B, C, H, W], which they are of.
        options: how they are given.
    """
    if options.output_fmt not in ("NCHW", "NLC"):
        raise ValueError(f"output_fmt is 'NCHW' or 'NLC', not {options.output_fmt!r}")
    found = [model.norm(y) if options.norm else y for y in found]
    before = model.num_prefix_tokens
    prefix, found = [y[:, :before] for y in found], [y[:, before:] for y in found]
    if options.output_fmt == "NCHW":
        grid = model.patch_embed.dynamic_feat_size((images.shape[-2], images.shape[-1]))
        found = [y.reshape(len(y), *grid, -1).permute(0, 3, 1, 2).contiguous() for y in found]
    with_prefix = options.return_prefix_tokens and before > 0
    if options.output_dict:
        as_dict = {"image_intermediates": found}
        if with_prefix:
            as_dict["image_intermediates_prefix"] = prefix
        return as_dict if options.intermediates_only else {**as_dict, "image_features": model.norm(x)}
    features: list[Argument] = list(zip(found, prefix, strict=True)) if with_prefix else found
    return features if options.intermediates_only else (model.norm(x), features)


class OwnParameters(nn.Module):
    """The parameters of a module that belong to none of its sub-modules, for the unit that they are part of.

    Both have one dict of them: what somebody puts there, such as `torch.func.functional_call`, holds for both.
    """

    def __init__(self, owner: nn.Module) -> None:
        super().__init__()
        self._parameters = owner._parameters


def check_scripted(units: str, grid: float, g: float) -> None:
    """Refuses in a script what it would compute otherwise than the network does."""
    if g > 0.0 and (units == "branch" or grid > 0.0):
        raise RuntimeError("TorchScript knows neither units of branches nor exact streams: trace or export the network")


def scripted_step(h: Tensor, y: Tensor, a: Optional[Tensor], g: float, s: float) -> Tensor:  # noqa: UP045
    """b' = s B(h) + (1 - g - s) h + g a of a whole block, with y = B(h), as TorchScript compiles it."""
    if a is None or g == 0.0:
        return y
    return (s * y + (1.0 - g - s) * h) + g * a


def scripted_merge(h: Tensor, a: Optional[Tensor], g: float) -> Tensor:  # noqa: UP045
    """The merge of both streams, as TorchScript compiles it."""
    if a is None or g == 0.0:
        return h
    return (h + g * a) / (1.0 + g)
