"""Blocks of a vision transformer that take and give two streams (Reversible Vision Transformers, arXiv 2302.04869).

The coupling formula with act = identity and g = 1, attention and MLP in turn:

    (b, a) -> (a + Attention(b), b) -> (a' + MLP(b'), b')

The blocks state it as ordinary operations, for evaluation, TorchScript, tracers and exporters; where memory is saved,
two `CoupledUnit`s per block run the same branches.
"""

from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import TYPE_CHECKING

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from petra_zoo.errors import UserError
from petra_zoo.models.layer_arguments import Argument
from petra_zoo.models.memory_modes import saves_memory
from petra_zoo.models.paper_blocks import paper_coupling
from petra_zoo.models.run_slices import RunSlices
from petra_zoo.models.transformer_parts import attention_in_groups, mlp_in_chunks
from petra_zoo.reversible import (
    CallsBranches,
    CoupledUnit,
    Streams,
    StreamType,
    Unit,
    backpropagate,
    coupled,
    run_branch,
)
from petra_zoo.reversible.stream_type import check_kind, scripted_kind, to_carrier

Branch = Callable[[Tensor], Tensor]


class TwoStreamBlock(Block):
    """timm's pre-norm block with its two branches coupled one after the other. Streams are [B, N, C].

    Args:
        kwargs: timm's arguments.

    Attributes:
        kind: what carries the streams, see `petra_zoo.reversible.StreamType`.
        chunks: in how many parts each branch is evaluated, see `petra_zoo.models.transformer_parts`.
    """

    if TYPE_CHECKING:
        norm1: nn.LayerNorm

    def __init__(self, *args: Argument, **kwargs: Argument) -> None:
        super().__init__(*args, **kwargs)
        self.kind = "auto"
        self.chunks = 1

    def attend(self, h: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """The first branch."""
        if not torch.jit.is_scripting():
            parted = attention_in_groups(self, self.chunks)
            if parted is not None and attn_mask is None and not is_causal:
                return parted(h)
        x = self.attn(self.norm1(h), attn_mask=attn_mask, is_causal=is_causal)
        return self.drop_path1(self.ls1(x))

    def transform(self, h: Tensor) -> Tensor:
        """The second branch."""
        if not torch.jit.is_scripting():
            parted = mlp_in_chunks(self, self.chunks)
            if parted is not None:
                return parted(h)
        return self.drop_path2(self.ls2(self.mlp(self.norm2(h))))

    @torch.jit.unused
    def attended(self, h: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """The first branch, compiled where that is asked for."""
        return run_branch(self, "attn", partial(type(self).attend, self), h, attn_mask, is_causal)

    @torch.jit.unused
    def transformed(self, h: Tensor) -> Tensor:
        """The second branch, likewise."""
        return run_branch(self, "mlp", partial(type(self).transform, self), h)

    # Two streams where timm's block takes their sum.
    def forward(  # type: ignore[override]
        self, b: Tensor, a: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Both streams behind the block; without `a` it starts the run: a = b."""
        h = self._for_branch(b)
        if torch.jit.is_scripting():
            f = self.attend(h, attn_mask, is_causal)
        else:
            f = self.attended(h, attn_mask, is_causal)
        b, a = self._plus(b, f, a), b
        h = self._for_branch(b)
        if torch.jit.is_scripting():
            f = self.transform(h)
        else:
            f = self.transformed(h)
        return self._plus(b, f, a), b

    @torch.jit.unused
    def streams(self) -> StreamType:
        """The type of the streams: what `auto` stands for now is decided."""
        return StreamType(kind=check_kind(self.kind)).now(paper_coupling, self)

    @torch.jit.unused
    def units(self, name: str, starts: bool) -> list[Unit]:
        """Attention and MLP as units.

        Args:
            name: the block's place in its model.
            starts: whether the first of them takes one stream.
        """
        parts: dict[str, list[nn.Module]] = {
            "attn": [self.norm1, self.attn, self.ls1, self.drop_path1],
            "mlp": [self.norm2, self.mlp, self.ls2, self.drop_path2],
        }
        branches: dict[str, Branch] = {
            "attn": attention_in_groups(self, self.chunks) or self.attended,
            "mlp": mlp_in_chunks(self, self.chunks) or self.transformed,
        }
        return [
            CoupledUnit(
                f"{name}.{part}",
                nn.ModuleList(parts[part]),  # not the block: each parameter belongs to one unit
                branch=branches[part],
                activate=_identity,
                coupling=paper_coupling,
                starts=starts and part == "attn",
                streams=self.streams,
            )
            for part in parts
        ]

    def _for_branch(self, h: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return h.to(self.norm1.weight.dtype)
        else:
            return self.streams().for_branch(h, self)

    def _plus(self, h: Tensor, f: Tensor, a: Tensor | None) -> Tensor:
        if torch.jit.is_scripting():
            kind = scripted_kind(self.kind, 1.0, 0.0, self.norm1.weight.dtype)
            return to_carrier(h + f, kind) if a is None else to_carrier(f, kind) + a
        else:
            return coupled(h, f, a, 1.0, self.streams())


class TwoStreamBlocks(CallsBranches, RunSlices):
    """The body of a reversible vision transformer: tokens [B, N, C] become both streams, concatenated, [B, N, 2C].

    Reversibility sits here, so that whoever calls it saves memory: in train mode it stores its output alone.
    Slices are bodies too, with the same blocks.

    Attributes:
        memory: see `petra_zoo.models.memory_modes.MemoryModes.set_memory`.
    """

    memory = "reversible"  # no annotation: TorchScript would have to resolve it

    if TYPE_CHECKING:

        def __iter__(self) -> Iterator[TwoStreamBlock]: ...

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if not torch.jit.is_scripting():  # TorchScript compiles this test away, and the rest with it
            if attn_mask is None and not is_causal and saves_memory(self, x):
                return self.join(*self.run((self.enter(x),)))
        b = self.enter(x)
        a: Tensor | None = None
        for block in self:
            b, a = block(b, a, attn_mask, is_causal)
        return self.join(b, a)

    def enter(self, x: Tensor) -> Tensor:
        """The one stream that tokens are in front of the first block."""
        return x if torch.jit.is_scripting() else self._first().streams().carry(x)

    def join(self, b: Tensor, a: Tensor | None = None) -> Tensor:
        """What the head reads: the streams behind the last attention and the last MLP, concatenated, [B, N, 2C]."""
        x = torch.cat([b if a is None else a, b], dim=-1)
        return x if torch.jit.is_scripting() else self._first().streams().leave(x, self._first())

    @torch.jit.unused
    def g(self) -> float:
        """The coupling."""
        return paper_coupling()

    @torch.jit.unused
    def blocks_to_compile(self) -> list[nn.Module]:
        """All.

        Raises:
            UserError: their branches are evaluated in parts.
        """
        if any(block.chunks > 1 for block in self):
            raise UserError("a branch in parts cannot be compiled: unset chunks, or leave out compile")
        return list(self)

    @torch.jit.unused
    def _first(self) -> TwoStreamBlock:
        return next(iter(self))

    @torch.jit.unused
    def run(self, streams: Streams) -> Streams:
        """The blocks in a training step that saves memory, from one stream, or from two in the middle of the run."""
        units = self.units("blocks", starts=len(streams) == 1)
        return backpropagate(units, streams, reconstruct=self.memory == "reversible")

    @torch.jit.unused
    def features(
        self, x: Tensor, indices: Collection[int], attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> list[Tensor]:
        """Both streams behind the blocks at `indices`, in their order, and those behind the last block."""
        saves = attn_mask is None and not is_causal and saves_memory(self, x)
        streams: Streams = (self.enter(x),)
        taps, first = [], 0
        for i in [*sorted(indices), len(self) - 1]:
            part = self[first : i + 1]
            if saves and len(part):
                streams = part.run(streams)
            else:
                for block in part:
                    streams = block(*streams, attn_mask=attn_mask, is_causal=is_causal)
            taps.append(self.join(*streams))
            first = i + 1
        return taps

    @torch.jit.unused
    def units(self, name: str, starts: bool = True) -> list[Unit]:
        """Two units per block; see `TwoStreamBlock.units`."""
        units: list[Unit] = []
        for key, block in zip(self._modules, self, strict=True):
            units += block.units(f"{name}.{key}", starts and not units)
        for unit in units:
            unit.outside = (self,)
        return units


def _identity(x: Tensor) -> Tensor:
    return x
